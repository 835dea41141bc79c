"""Sparse mixtures of experts: routers, layers that gather and scatter tokens, and load balancing of experts."""

from descant.modules.moe.balance import expert_terms as expert_terms
from descant.modules.moe.balance import observe as observe
from descant.modules.moe.capacity import Capacity as Capacity
from descant.modules.moe.expert_choice import CausalAux as CausalAux
from descant.modules.moe.expert_choice import ExpertChoice as ExpertChoice
from descant.modules.moe.layer import ExpertLayers as ExpertLayers
from descant.modules.moe.layer import GELUExperts as GELUExperts
from descant.modules.moe.layer import MoELayer as MoELayer
from descant.modules.moe.layer import SwiGLUExperts as SwiGLUExperts
from descant.modules.moe.modality_linear import ModalityLinear as ModalityLinear
from descant.modules.moe.modality_linear import VisualExperts as VisualExperts
from descant.modules.moe.modality_routing import HardModality as HardModality
from descant.modules.moe.modality_routing import ModalityTopK as ModalityTopK
from descant.modules.moe.modality_routing import StaticSkill as StaticSkill
from descant.modules.moe.parallel import parallelize as parallelize
from descant.modules.moe.parallel import whole_experts as whole_experts
from descant.modules.moe.routing import Marks as Marks
from descant.modules.moe.routing import Router as Router
from descant.modules.moe.routing import Routing as Routing
from descant.modules.moe.routing import TaskGate as TaskGate
from descant.modules.moe.routing import TopKRouter as TopKRouter
from descant.modules.moe.routing import join_routings as join_routings
from descant.modules.moe.routing import move_biases as move_biases
from descant.modules.moe.top_p import TopPRouter as TopPRouter
