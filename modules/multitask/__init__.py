"""Multi-task rules: one file a rule, named after its paper. YAML and ``from descant import NAME`` need no line here."""

from descant.modules.multitask.aligned_mtl import AlignedMTL as AlignedMTL
from descant.modules.multitask.base import Rule as Rule
from descant.modules.multitask.base import SolverRule as SolverRule
from descant.modules.multitask.cagrad import CAGrad as CAGrad
from descant.modules.multitask.cmgh import CMGH as CMGH
from descant.modules.multitask.config import ConFIG as ConFIG
from descant.modules.multitask.dualproj import DualProj as DualProj
from descant.modules.multitask.dwa import DWA as DWA
from descant.modules.multitask.fairgrad import FairGrad as FairGrad
from descant.modules.multitask.famo import FAMO as FAMO
from descant.modules.multitask.graddrop import GradDrop as GradDrop
from descant.modules.multitask.gradnorm import GradNorm as GradNorm
from descant.modules.multitask.gradvac import GradVac as GradVac
from descant.modules.multitask.imtl_g import IMTLG as IMTLG
from descant.modules.multitask.imtl_l import IMTLL as IMTLL
from descant.modules.multitask.mgda import MGDA as MGDA
from descant.modules.multitask.mimo import MIMO as MIMO
from descant.modules.multitask.mmpareto import MMPareto as MMPareto
from descant.modules.multitask.nash_mtl import NashMTL as NashMTL
from descant.modules.multitask.pcgrad import PCGrad as PCGrad
from descant.modules.multitask.rlw import RLW as RLW
from descant.modules.multitask.sdmgrad import SDMGrad as SDMGrad
from descant.modules.multitask.stch import STCH as STCH
from descant.modules.multitask.uncertainty import UncertaintyWeighting as UncertaintyWeighting
from descant.modules.multitask.upgrad import UPGrad as UPGrad
