"""What a run is asked to do, as frozen dataclasses: the only form in which configuration passes the door.

Nothing here imports torch or Hydra, so that a configuration is read and checked before any long work.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from besa_exp.rules import Count, CountOrZero, Fraction, NotNegative, Positive, Seed, Share, one_of, within

Target = Annotated[float, within(least=0, below=1, note="the fraction of weights that become zero")]
TableBits = Annotated[int, within(least=2, most=4)]  # of recovery=sketch
BlockNumber = Annotated[int, within(least=0, note="as blocks are counted from 0")]
Cosine = Annotated[float, within(least=-1, most=2, note="or 2, which never skips")]
Distilled = Annotated[str, one_of("none", "logits", "squarehead")]
Schedules = Annotated[str, one_of("constant", "linear", "cosine")]
TOKENS_TOGETHER = 2048  # that pass the model together while it is tuned
Window = Annotated[int, within(least=2, note="as a token is predicted from one before it")]


@dataclass(frozen=True)
class ModelSettings:
    """The model to prune: `path` is a folder, a hub id, or `embedded` for the model that the package carries."""

    name: str
    path: str
    revision: str | None = None
    dtype: str = "auto"  # auto (as saved), float32, bfloat16, float16
    load: Literal["auto", "whole", "streamed"] = "auto"  # streamed: one block in memory at a time
    trust_remote_code: bool = False
    convert: bool = False  # pickled weights (.bin) or a GGUF file are written as safetensors first
    context: Window | None = None  # longest window in tokens, as known before the model's own config is there
    published_perplexity: dict[str, dict[int, Positive]] = field(default_factory=dict)  # set to window to value, dense


@dataclass(frozen=True)
class CalibrationSettings:
    """Where the calibration tokens come from; `path` (text or a .safetensors of `input_ids`) wins over `name`."""

    name: str
    path: str | None = None
    column: str = "text"  # of JSON lines and parquet: where the documents are
    num_samples: Count = 128
    seq_len: Window = 2048
    seed: Seed = 0
    batch_size: Count = 8  # samples a forward pass of the block loop holds
    save_tokens: bool = False
    chat_template: bool = False  # each text is a conversation or a user's turn, as the tokenizer's template writes it


@dataclass(frozen=True)
class EvaluatorSettings:
    """What is scored after pruning (and before it with `dense`)."""

    name: str
    perplexity_sets: tuple[str, ...] = ()
    column: str = "text"  # of perplexity sets in JSON lines and parquet: where the documents are
    seq_len: Window | None = None  # perplexity window; None: min(2048, the model's context)
    tasks: tuple[str, ...] = ()  # lm-eval's tasks, groups and tags, and those of include_path
    include_path: str | None = None  # a folder with task definitions of one's own
    max_windows: Count | None = None  # first windows of each perplexity set; None: all
    limit: Count | None = None
    num_fewshot: CountOrZero | None = None  # None: as each task says
    batch_size: Count | Literal["auto"] = "auto"  # windows or questions scored together
    data_dir: str | None = None
    dense: bool = False
    simulated_speed: bool = False  # cycles on a simulated sparse accelerator
    speed: bool = False  # measured: cost, tokens a second, and 2:4 products against dense ones
    prompts: tuple[str, ...] | None = None  # text samples; None: the fixed ones where sets or tasks are scored


@dataclass(frozen=True)
class SkippingSettings:
    """What the model skips while it is scored: FFNs of decoded tokens, or (`shortgpt_gen`) whole blocks of prompts. Of
    `fraction`, the threshold, or the blocks, are found on calibration tokens where they are not given."""

    name: Literal["ffn", "static", "random", "shortgpt_gen"]
    fraction: Annotated[float, within(least=0, most=1)] | None = None  # of all FFNs (shortgpt_gen: blocks)
    threshold: Cosine | None = None  # ffn: the cosine from which on the next FFNs are skipped
    blocks: tuple[BlockNumber, ...] = ()  # static, shortgpt_gen: which
    span: Count | None = None  # ffn: FFNs skipped after the threshold is reached; None: up to the cold end
    cold_first: CountOrZero = 1  # first and last blocks that never skip
    cold_last: CountOrZero = 1
    warm_tokens: CountOrZero = 0  # first decoded tokens that never skip
    prompt_tokens: CountOrZero = 0  # first tokens of each window or question that count as its prompt
    num_samples: Count = 8  # calibration windows on which the threshold or the blocks are found
    seed: Seed = 0  # random: of what is drawn

    @property
    def is_calibrated(self) -> bool:
        """Whether something is to be found on calibration tokens."""
        return self.name != "random" and self.threshold is None and not self.blocks

    @property
    def asked(self) -> dict[str, Any]:
        """As plain values, without those that say nothing."""
        of_all, found, ends = ("name", "prompt_tokens"), ("fraction", "num_samples"), ("cold_first", "cold_last")
        of_policy = {
            "ffn": ("threshold", "span", "warm_tokens", *ends),
            "static": ("blocks", "warm_tokens", *(ends if self.is_calibrated else ())),
            "random": ("fraction", "seed", "warm_tokens"),
            "shortgpt_gen": ("blocks", *(ends if self.is_calibrated else ())),
        }
        said = (*of_all, *of_policy[self.name], *(found if self.is_calibrated else ()))
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in given.items() if key in said and value not in (None, [])}


@dataclass(frozen=True)
class TrackerSettings:
    """Where the run is logged besides its own folder."""

    name: str  # wandb or none
    mode: str = "offline"  # offline, online, disabled
    project: str = "besa"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    system_metrics: bool = False  # the machine's load, memory and GPUs along the run


@dataclass(frozen=True)
class SaveSettings:
    """What the run folder keeps of the weights."""

    model: bool = True
    masks: bool = True
    verify: bool = True  # load the saved model in a fresh process too
    push_to_hub: str | None = None  # owner/name on the hub that receives the saved model, private


@dataclass(frozen=True)
class RecoverySettings:
    """How the whole pruned model is tuned: `name` is the method, `method` one that is not the package's. What only some
    methods have is None with the others; `besa_exp.recovery.recipe` makes the method of it."""

    name: str
    method: Any = None
    lr: Positive | None = None  # None: found by trial
    path: str | None = None  # a local text or token file in place of the calibration's source
    column: str = "text"
    task: str | None = None  # in place of a text; `path` is then a file of its rows
    task_loss: str = "options"  # or answer, accuracy
    shots: Count = 500  # examples of each label of the task to learn from
    tested: Count = 500  # examples of the task that are scored
    steps: Count = 200
    tokens: Count | None = None  # in the place of steps
    seq_len: Window | None = None  # None: the calibration's
    batch_size: Count = 8
    micro_batch: Count | None = None  # windows that pass the model together; None: see `windows_together`
    checkpointing: bool = False
    shard: bool = False  # full: the model is dealt out to the processes of torchrun
    schedule: Schedules = "cosine"
    warm_up: Annotated[float, within(least=0, below=1)] = 0.1  # share of the steps
    held_out: Count = 32  # windows that choose the state that is kept
    checks: Count = 10  # how often they judge
    distill: Distilled = "none"
    distill_weight: NotNegative = 1.0
    task_weight: NotNegative = 1.0
    temperature: Positive = 1.0
    decay: NotNegative = 0.0
    clip: Positive | None = None
    seed: Seed = 0
    embeddings: bool | None = None
    norms: bool | None = None
    rank: Count | None = None
    alpha: Positive | None = None
    bits: TableBits | None = None
    eps: Positive | None = None
    selection: str | None = None
    density: Fraction | None = None
    reselect: Annotated[int, within(least=3)] | None = None
    first: Share | None = None
    gather: Count | None = None
    share: Share | None = None
    kinds: tuple[str, ...] | None = None
    scope: str | None = None
    exchange: bool | None = None

    @property
    def windows_together(self) -> int:
        """Where nothing is said, as many as hold TOKENS_TOGETHER: activations lie in memory until the way back."""
        return self.micro_batch or min(self.batch_size, max(1, TOKENS_TOGETHER // (self.seq_len or TOKENS_TOGETHER)))


@dataclass(frozen=True)
class RunSettings:
    """One prune. `pruner` is the pruner object itself, `pruner_name` the preset it came from, those of `structure`,
    `budget` and `update` added where they are given."""

    model: ModelSettings
    calibration: CalibrationSettings
    pruner: Any
    pruner_name: str
    evaluator: EvaluatorSettings
    tracker: TrackerSettings
    update: Any = None  # what the kept weights do, after the pruner; None: what the pruner says
    budget: Any = None  # how much each block gives up; None: all the same
    recovery: RecoverySettings | None = None  # how the whole pruned model is tuned; None: not at all
    structure: Any = None  # what is taken out whole before all else; None: nothing
    skipping: SkippingSettings | None = None  # what is skipped while the models are scored
    sparsity: Target = 0.5
    pattern: str = "unstructured"  # or "2:4": 2 kept of every 4 inputs; or "N:8": N chosen by row
    ignore: tuple[str, ...] = ()  # patterns of BLOCK.linear: what stays dense
    seed: Seed = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    deterministic: bool = True
    offline: bool = False
    resume: bool = True  # go on after the last whole block of an unfinished run
    overwrite: bool = False
    compute_dtype: Literal["auto", "bfloat16"] = "auto"  # of the block loop's products; auto: the weights'
    activations: Literal["auto", "device", "host", "disk"] = "auto"  # where hidden states lie between blocks
    verbose: bool = False  # show every choice and the zeros of each block
    profile: bool = False  # write profile.txt into the run folder
    dry_run: bool = False  # show what the run will need, and run nothing
    device_name: Literal["here", "h200", "a100"] = "here"  # of what a dry run tells: this machine's, or a GPU by name
    save: SaveSettings = field(default_factory=SaveSettings)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is to be pruned or updated: the model is only scored, and kept nowhere."""
        return self.pruner_name == "dense"

    @property
    def keeps_weights(self) -> bool:
        """Whether no weight is to become zero: the pruner is dense, with whatever else."""
        return "dense" in self.pruner_name.split("+")

    @property
    def keeps_model(self) -> bool:
        """Whether the run folder will hold a model."""
        return self.save.model and not self.is_dense


@dataclass(frozen=True)
class EvaluationSettings:
    """One scoring of a checkpoint: `checkpoint` as it was named, `model.path` the folder or hub id that it means."""

    checkpoint: str
    model: ModelSettings
    evaluator: EvaluatorSettings
    tracker: TrackerSettings
    skipping: SkippingSettings | None = None  # what is skipped while it is scored
    calibration: CalibrationSettings | None = None  # of what skipping.fraction is found on
    seed: Seed = 0  # of few-shot examples
    device: str = "auto"
    deterministic: bool = True
    offline: bool = False
    overwrite: bool = False  # score again what is scored


@dataclass(frozen=True)
class TuneSettings:
    """One tuning of a checkpoint under its own zeros. `calibration` names the text where `recovery.path` does not."""

    checkpoint: str
    model: ModelSettings
    calibration: CalibrationSettings
    recovery: RecoverySettings
    evaluator: EvaluatorSettings
    tracker: TrackerSettings
    dense: bool = False  # a model without zeros is tuned too
    teacher: str | None = None  # the dense model that is followed where one is; None: the one that was pruned
    seed: Seed = 0
    device: str = "auto"
    deterministic: bool = True
    offline: bool = False
    resume: bool = True
    overwrite: bool = False
    save: SaveSettings = field(default_factory=SaveSettings)
