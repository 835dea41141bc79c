"""Base classes of layers, for rules that hold for all layers of a kind.

torch has to keep: batch norms derive from ``BatchNorm``, batch and instance norms from ``NormBase``. Convolutions
derive from ``Conv``, transposed ones from ``ConvTranspose`` too, and dropout from ``Dropout``. A list of the public
classes would miss those that other packages derive from the bases. ``Orthogonal`` is the parametrization that
``torch.nn.utils.parametrizations.orthogonal`` adds, and its ``base`` is the point of its map.
"""

from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as Conv
from torch.nn.modules.conv import _ConvTransposeNd as ConvTranspose
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.nn.utils.parametrizations import _Orthogonal as Orthogonal

__all__ = ["BatchNorm", "Conv", "ConvTranspose", "Dropout", "NormBase", "Orthogonal"]
