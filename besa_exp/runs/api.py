"""Pruning from Python, without Hydra, W&B or the command line: `besa_exp.prune` and `besa_exp.load_model`.

A model object is pruned in place by the same block loop as a run's, with the same bytes; a path is pruned as
`besa prune` does it, into a run folder.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa_exp.blocks.ignored import Ignored
from besa_exp.blocks.pruner import Pruner
from besa_exp.blocks.reports import BlockReport, Size, share_of_zeros
from besa_exp.checkpoints.files import load_masks
from besa_exp.checkpoints.load import LoadedModel, check_finite_weights
from besa_exp.checkpoints.load import load_model as load
from besa_exp.display.console import RunConsole
from besa_exp.display.missed_target import out_of_reach
from besa_exp.display.tracker import Tracker
from besa_exp.errors import ConfigurationError
from besa_exp.report.loaded import linear_table, load_run
from besa_exp.run_folder.finished_blocks import FinishedBlocks
from besa_exp.run_folder.folder import RunFolder, absent, remove_refused
from besa_exp.run_folder.identity import check_finished, config_of
from besa_exp.run_folder.inputs import check_run_inputs
from besa_exp.run_folder.spent import Spent
from besa_exp.run_folder.status import is_done
from besa_exp.runs.as_a_run import as_a_run, torch_as_before
from besa_exp.runs.block_loop import check_blocks
from besa_exp.runs.prune import prune as prune_into
from besa_exp.runs.prune_model import check_refinements, prune_model
from besa_exp.runs.python_request import Texts, asked_in_python, for_paths_alone, model_settings
from besa_exp.runs.run import Run, Work, parameters
from besa_exp.settings import EvaluatorSettings, RecoverySettings, RunSettings
from besa_exp.tensors.masks import Goal
from besa_exp.texts.calibration import Calibration
from besa_exp.texts.sources import GIVEN

KeepMasks = Mapping[str, Bool[Tensor, "_out _in"]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneReport:
    """What pruning did, block by block.

    `target`: the sparsity that was asked for, in [0, 1). `keep_masks`: {weight's name in the model: bool [out in], True
    where the weight was kept}, on the CPU; empty where a run kept no masks. `tokens_sha256`: hash of the calibration
    tokens. `folder`: the run folder; None where a model object was pruned."""

    blocks: tuple[BlockReport, ...]
    target: float
    keep_masks: KeepMasks
    tokens_sha256: str
    folder: Path | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights of all pruned linears, in [0, 1], counted after pruning."""
        return share_of_zeros(linear for block in self.blocks for linear in block.linears)

    @property
    def losses(self) -> list[float]:
        """Each block's reconstruction loss on the probe samples after pruning, in block order: the squared error
        of a token's output relative to the dense one's, mean over tokens, unless the pruner's `loss` is another."""
        return [block.loss_after for block in self.blocks]

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each linear of each block; see `linear_table`. ConfigurationError: no pandas."""
        return linear_table(self.blocks)

    def __repr__(self) -> str:
        place = f", folder={str(self.folder)!r}" if self.folder else ""
        return f"PruneReport({len(self.blocks)} blocks, sparsity={self.sparsity:.4f}, target={self.target:g}{place})"


def load_model(path: str = "embedded", *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """The model and the tokenizer (None where there is none) of `path`: a folder, a hub id or a preset of `besa list
    models`; `embedded` is the small model that the package carries.

    `dtype`: float32, bfloat16, float16, or auto (as the preset says, else as saved). `device`: cpu, cuda, cuda:N, or
    auto (a GPU where there is one).

    ConfigurationError: the model cannot be found, or its files lack weights or hold others."""
    settings = replace(model_settings(path), load="whole")
    settings = settings if dtype == "auto" else replace(settings, dtype=dtype)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(automatic if device == "auto" else device)
    except RuntimeError as error:
        raise ConfigurationError(f"device={device}: must be auto, cpu, cuda or cuda:N") from error
    loaded = load(settings, place, offline=False)
    return loaded.model, loaded.tokenizer


def prune(
    model_or_path: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts_or_tokens: Texts = "embedded",
    *,
    pruner: str | Pruner = "besa",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    update: Any = None,
    budget: Any = None,
    ignore: Sequence[str] = (),
    recovery: str | RecoverySettings | None = None,
    structure: Any = None,
    seed: int = 0,
    num_samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    compute_dtype: str = "auto",
    out: str | Path | None = None,
    evaluator: str | EvaluatorSettings = "none",
    overwrite: bool = False,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> PruneReport:
    """Prune a model object in place, or the model at a path (a folder, a hub id, a preset) into the run folder `out`.

    `texts_or_tokens` calibrate: the name of a set (`c4`, `embedded`), a path of a text or token file, a list of texts,
    or token ids [sample seq], which are used as they are. `num_samples` windows of `seq_len` tokens are drawn from
    texts, and `batch_size` of them pass through a block together; None: as the set's preset says; for given texts 128
    windows of 2,048 tokens, or of the model's context if that is shorter. `tokenizer` is needed for texts only.

    `sparsity`: the fraction of the blocks' linear weights that become zero, in [0, 1). `pattern`: `unstructured`, or
    N:M (N kept of every M consecutive inputs, `2:4`), which fixes the sparsity. `ignore`: patterns of BLOCK.linear
    (`0.*`, `*.mlp.down_proj`) that stay dense; the sparsity is met over the rest.

    `pruner`, `update`, `budget`: the name of a preset (`besa list pruners`) or an object; `besa_exp.preset(group,
    name)` makes a preset's object. `seed` seeds the draws of calibration windows and the presets given by name.
    `compute_dtype`: of the products, `auto` (the weights') or `bfloat16`. `on_block` is called with each block's
    report: when it is finished, or, with `out`, at the end.

    With a path only: `out`, where the same call resumes an unfinished run; `structure` and `recovery`, names or
    objects; `evaluator`, which scores the pruned model; `overwrite`, which replaces a finished run.

    ConfigurationError (a ValueError): the request cannot be carried out as written; it names all problems, before any
    weight changes. RunError: pruning failed in a block, which it names; a model object then has the blocks before it
    pruned."""
    settings, read = asked_in_python(
        model_or_path, texts_or_tokens, {"num_samples": num_samples, "seq_len": seq_len, "batch_size": batch_size},
        pruner=pruner, update=update, budget=budget, structure=structure, recovery=recovery, ignore=ignore, seed=seed,
        sparsity=sparsity, pattern=pattern, compute_dtype=compute_dtype, evaluator=evaluator, overwrite=overwrite,
    )  # fmt: skip
    if isinstance(model_or_path, (str, Path)):
        return _pruned_into(settings, out, tokenizer, read, on_block)
    if problems := for_paths_alone(settings, out):
        raise ConfigurationError(*problems)
    return _pruned_in_place(settings, LoadedModel(model_or_path, tokenizer, None, Path()), read, on_block)


def _pruned_in_place(
    settings: RunSettings,
    loaded: LoadedModel,
    read: Callable[[LoadedModel], Calibration],
    on_block: Callable[[BlockReport], None],
) -> PruneReport:
    """The stage that prunes, as in a run. What it keeps on the way lies in a temporary folder until the end."""
    if warning := out_of_reach(settings):
        logger.warning(warning)
    with (
        as_a_run(loaded.model, settings.seed, settings.deterministic),
        tempfile.TemporaryDirectory(prefix="besa-") as place,
    ):
        check_finite_weights(loaded.model, settings.model.path)
        calibration = read(loaded)
        batch_size, ignored = settings.calibration.batch_size, Ignored(settings.ignore)
        check_blocks(loaded, calibration.input_ids, batch_size, ignored, settings.pattern)
        folder = RunFolder(Path(place))
        check_refinements(settings, loaded, folder.path)
        spent, size = Spent(folder.spent, dict), parameters(loaded)
        run = Run(settings, {}, loaded.model.device, folder, RunConsole(quiet=True), spent, _Told(on_block))
        work = prune_model(run, Work(loaded, calibration, Size(size, size), FinishedBlocks(folder.blocks)))
        files = work.finished.mask_files(len(work.reports))
        masks = {name: mask for file in files for name, mask in load_masks(file).items()}
    target = 0.0 if settings.keeps_weights else Goal.parse(settings.sparsity, settings.pattern).sparsity
    return PruneReport(work.reports, target, masks, calibration.tokens_sha256)


class _Told(Tracker):
    """Tells the program that calls of each block, and logs nothing."""

    def __init__(self, on_block: Callable[[BlockReport], None]):
        super().__init__()
        self._on_block = on_block

    def log_block(self, report: BlockReport) -> None:
        self._on_block(report)


def _pruned_into(
    settings: RunSettings,
    out: str | Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    read: Callable[[LoadedModel], Calibration],
    on_block: Callable[[BlockReport], None],
) -> PruneReport:
    """A run in the folder `out`, as `besa prune` makes it."""
    if out is None or not str(out).strip():
        raise ConfigurationError(
            f"{settings.model.path} is a path: give out=FOLDER, where the run goes, or prune a model object in place: "
            "model, tokenizer = besa_exp.load_model(path)"
        )
    folder = Path(out)

    def calibrate(loaded: LoadedModel) -> Calibration:
        return read(replace(loaded, tokenizer=tokenizer or loaded.tokenizer))

    if not _is_answered(settings, folder, tokenizer):
        made = absent(folder)
        try:
            with torch_as_before():
                prune_into(settings, folder, calibrate=calibrate)
        except ConfigurationError:
            remove_refused(made)
            raise
    run = load_run(folder)
    for report in run.blocks:
        on_block(report)
    calibration = run.results["calibration"] or {}
    tokens = calibration.get("tokens_sha256", "")
    return PruneReport(run.blocks, run.results["target_sparsity"], run.masks(), tokens, folder)


def _is_answered(settings: RunSettings, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the run that is asked for is finished there, as far as that is known before given texts are read.
    ConfigurationError: the finished run there is another."""
    given = tokenizer is not None or settings.calibration.name in GIVEN
    if settings.overwrite or given or not is_done(folder):
        return False
    if problems := check_finished(folder, config_of(settings)) + check_run_inputs(folder, settings):
        raise ConfigurationError(*problems)
    return True
