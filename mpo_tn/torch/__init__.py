"""The adapter: MPO modules for torch, compression of pre-trained models, and their round trip through transformers.

Once this package and transformers are imported, in either order, the ``"mpo"`` quantizer is registered, so that
``AutoModel.from_pretrained`` reads compressed models. Neither imports the other: who only factorises matrices needs no
transformers, which takes as much memory as torch.
"""

import importlib
from functools import partial

from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.coverage import Coverage, DenseMatrix
from mpo_tn.planning.entries import LeftDense, UnitPlan
from mpo_tn.planning.plan import Plan
from mpo_tn.planning.ranking import RankedCut, Ranking
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.layers.embedding import MPOEmbedding
from mpo_tn.torch.layers.layer import MPOLayer, MPOLinear
from mpo_tn.torch.layers.modes import set_mode
from mpo_tn.torch.layers.parameter import MPOParameter
from mpo_tn.torch.layers.quantized import QuantizedCore
from mpo_tn.torch.layers.workspace import free_workspace
from mpo_tn.torch.loops.heal import heal
from mpo_tn.torch.loops.recipe import HealResult
from mpo_tn.torch.loops.rounds import SqueezeResult, SqueezeRound
from mpo_tn.torch.loops.squeeze import squeeze
from mpo_tn.torch.models.blocks import BlockSample
from mpo_tn.torch.models.blockwise import BlockStep, calibrate_blocks
from mpo_tn.torch.models.calibrate import calibrate
from mpo_tn.torch.models.calibration import Calibration, Moments
from mpo_tn.torch.models.compress import compress
from mpo_tn.torch.models.cuts import bond_spectra, cut_model
from mpo_tn.torch.models.decide import plan
from mpo_tn.torch.models.dense import to_dense
from mpo_tn.torch.models.report import CompressionReport, LayerReport
from mpo_tn.torch.models.trainable import FreezeReport, freeze, parameter_groups, print_trainable_parameters
from mpo_tn.torch.state.saved_cores import load_cores, save_cores
from mpo_tn.torch.state.training_state import load_state, save_state
from mpo_tn.truncate.bond_cut import Cut, cut_bond
from mpo_tn.when_imported import when_imported


def _hook(name: str) -> None:
    getattr(importlib.import_module("mpo_tn.torch.hf.hooks"), name)()


# All of them here: one that is imported by another is half there when that one's turn comes.
when_imported("transformers", partial(_hook, "of_transformers"))
when_imported("transformers.trainer", partial(_hook, "of_trainer"))
when_imported("sentence_transformers", partial(_hook, "of_sentence_transformers"))
when_imported("huggingface_hub.hub_mixin", partial(_hook, "of_mixin"))
when_imported("peft", partial(_hook, "of_peft"))

__all__ = [
    "BlockSample",
    "BlockStep",
    "Calibration",
    "CompressionReport",
    "Coverage",
    "Cut",
    "DenseMatrix",
    "FreezeReport",
    "HealResult",
    "LayerReport",
    "LeftDense",
    "MPOConfig",
    "MPOEmbedding",
    "MPOLayer",
    "MPOLinear",
    "MPOParameter",
    "ModuleSpec",
    "Moments",
    "Plan",
    "QuantizedCore",
    "RankedCut",
    "Ranking",
    "SqueezeResult",
    "SqueezeRound",
    "UnitPlan",
    "bond_spectra",
    "calibrate",
    "calibrate_blocks",
    "compress",
    "cut_bond",
    "cut_model",
    "free_workspace",
    "freeze",
    "heal",
    "load_cores",
    "load_state",
    "parameter_groups",
    "plan",
    "print_trainable_parameters",
    "save_cores",
    "save_state",
    "set_mode",
    "squeeze",
    "to_dense",
]
