"""A device that is written in Python, and the functions that make tensors on a device.

torch has to keep: ``register_python_device(name, backend_module=...)`` adds the device and ``torch.<name>``.
``PythonDeviceModule`` has the functions that torch asks every such module for. The public
``rename_privateuse1_backend`` needs a device guard in C++. ``device_constructors()`` is the set of functions that take
a ``device``. torch uses it for ``with torch.device(...)`` and exports it nowhere.
"""

from torch.utils._device import _device_constructors as device_constructors
from torch.utils.backend_registration import _DummyBackendModule as PythonDeviceModule
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register_python_device

__all__ = ["PythonDeviceModule", "device_constructors", "register_python_device"]
