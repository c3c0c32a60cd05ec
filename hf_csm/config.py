"""All options of a training run. `config_parser` reads them from a YAML file and the command line.

The docstring under a field is its `--help`. The groups have the names of the fine-tuning guide (`moshi_paths`,
`dataset`, `lora`, `training`, `optimizer`, `scheduler`, `advanced`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal, Optional

from hf_csm.errors import UserError


# `Optional[...]` and not `... | None`: jsonargparse resolves these annotations at run time on Python 3.10 too.
# ruff: noqa: UP045

Trait = Literal["corpus", "emotion", "speaker", "language"]


@dataclass
class MoshiPaths:
    """The base model."""

    hf_repo_id: str = "kyutai/moshiko-pytorch-bf16"
    """Base model with its Mimi codec and tokenizer: a Hub repository, or a local folder with the same files."""
    revision: Optional[str] = None
    """Branch, tag or commit of the Hub repository; null for its main branch."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen base weights. Adapter weights are always float32."""


@dataclass
class Source:
    """One table of codes in the mixture."""

    path: str
    """Table of codes: a folder, a Hub dataset `user/name`, or a JSONL manifest, which is encoded before training."""
    weight: float = 1.0
    """Factor on the probability of drawing from this table, before `max_repeats`."""
    revision: Optional[str] = None
    """Branch, tag or commit of the Hub dataset; null for its main branch."""

    def __post_init__(self) -> None:
        _at_least("dataset.sources.weight", self.weight, 0.0, above=True)


@dataclass
class Balance:
    """Sampling probability of each group of windows: `weight * seconds ** temperature`, normalized."""

    by: list[Trait] = field(default_factory=lambda: ["corpus", "emotion"])
    """Columns that define a group; fewer or more are possible, such as [corpus, emotion, speaker]."""
    temperature: float = 0.5
    """1 draws emotions as recorded, 0 draws them equally often."""
    max_repeats: float = 4.0
    """Maximum passes over a small group per pass over the mixture; the excess goes to the other groups."""

    def __post_init__(self) -> None:
        if not self.by or len(set(self.by)) < len(self.by):
            raise UserError(f"dataset.balance.by is {self.by}.", "Name some of corpus, emotion, speaker, language.")
        _share("dataset.balance.temperature", self.temperature)
        _at_least("dataset.balance.max_repeats", self.max_repeats, 1.0)


@dataclass
class Replay:
    """Ordinary dialogues mixed in against forgetting. Filters and balancing do not apply to them."""

    manifest_path: str
    """Table of codes, as in `sources`. Its training split is used."""
    fraction: float
    """Share of the training windows drawn from this table."""


@dataclass
class DatasetConfig:
    """Training data, batches and emotion conditioning."""

    manifest_path: Optional[str] = None
    """Table of codes to train on: a folder, a Hub id or a JSONL manifest. Shorthand for one entry in `sources`."""
    val_manifest_path: Optional[str] = None
    """Table of codes whose validation split is evaluated; null for the validation splits of the training tables."""
    sources: list[Source] = field(default_factory=list)
    """Tables of codes with their weights, to train on several."""
    duration_sec: float = 80.0
    """Maximum window length in seconds. Longer conversations are truncated, with a warning."""
    batch_size: int = 8
    """A micro-batch holds up to `batch_size * duration_sec` seconds of audio, padding included."""
    batch_by_length: bool = True
    """Batch windows of similar length together; false takes `batch_size` windows in the order drawn."""
    balance: Balance = field(default_factory=Balance)
    replay: Optional[Replay] = None
    """Ordinary dialogues to mix in; null for none."""
    emotions: Optional[list[str]] = None
    """Train on these emotions only; null for all. With `control: none`, this trains one adapter per emotion."""
    languages: Optional[list[str]] = None
    """Train on these languages only, such as [en]; null for all."""
    speakers: Optional[list[str]] = None
    """Train on these speakers only, such as [ravdess-01]; null for all. Validation is not filtered."""
    control: Literal["prefix", "none"] = "prefix"
    """`prefix` writes the emotion into the first frames of the text stream; `none` does not."""
    prefix_template: str = "({emotion})"
    """Text of the prefix."""
    prefix_dropout: float = 0.1
    """Share of training windows without the prefix, which allows classifier-free guidance."""

    def __post_init__(self) -> None:
        _at_least("dataset.duration_sec", self.duration_sec, 1.0)
        _at_least("dataset.batch_size", self.batch_size, 1)
        _share("dataset.prefix_dropout", self.prefix_dropout)
        if self.replay is not None:  # not in Replay: jsonargparse would nest the message in its own
            _share("dataset.replay.fraction", self.replay.fraction, below_one=True)
            if not self.replay.manifest_path:
                raise UserError("dataset.replay.manifest_path is empty.", "Name a table, or null for no replay.")
        try:
            names_emotion = self.prefix_template.format(emotion="sad") != self.prefix_template
        except (KeyError, IndexError, ValueError):
            names_emotion = False
        if not names_emotion:
            raise UserError(
                f"dataset.prefix_template is {self.prefix_template!r}.",
                "Put {emotion} where the name of the emotion goes, with no other braces.",
            )
        for name in ("emotions", "languages", "speakers"):
            if getattr(self, name) == []:
                raise UserError(
                    f"dataset.{name} is empty, which excludes everything.", "Name some, or give null for all."
                )
        if self.manifest_path and self.sources:
            raise UserError(
                "dataset.manifest_path and dataset.sources are both given.",
                "Name all tables in dataset.sources, or empty it with --dataset.sources '[]'.",
            )

    def training_sources(self) -> list[Source]:
        """Return the tables to train on, from `sources` or `manifest_path`."""
        if self.manifest_path:
            return [Source(self.manifest_path)]
        if not self.sources:
            raise UserError(
                "No training data is configured.",
                "Set dataset.manifest_path (or dataset.sources) to a folder written by `hf-csm encode`.",
            )
        return self.sources


@dataclass
class LoraSettings:
    """The adapter."""

    rank: int = 128
    """Rank of the LoRA matrices."""
    alpha: float = 256.0
    """The LoRA update is scaled by `alpha / rank`."""
    dropout: float = 0.0
    """Dropout probability on the input of the LoRA layers."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Modules to adapt in the temporal and the depth transformer, by their common names or moshi's own;
    `all-linear` for every linear layer, including the heads."""

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 1)
        _at_least("lora.alpha", self.alpha, 0.0, above=True)
        _share("lora.dropout", self.dropout, below_one=True)


@dataclass
class LossConfig:
    """Token weights in the loss. The weighted sum is divided by the total weight of the optimizer step."""

    text_weight: float = 17.0
    """Weight of a text token. 17 equals the total weight of the audio tokens of a frame at the defaults below."""
    text_padding_weight: float = 0.5
    """Factor on `text_weight` where the target is text padding."""
    first_codebook_weight: float = 10.0
    """Weight of codebook 0, the semantic codebook."""
    other_codebooks_weight: float = 1.0
    """Weight of each acoustic codebook (timbre and prosody)."""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            _at_least(f"loss.{option.name}", getattr(self, option.name), 0.0)


@dataclass
class TrainingConfig:
    """Training length, checkpoints, evaluation and logging."""

    max_steps: int = 3000
    """Optimizer steps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per process and optimizer step."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm for clipping; 0 disables clipping."""
    save_every: int = 500
    """Steps between checkpoints. The last step is always saved."""
    keep_checkpoints: int = 3
    """Number of recent checkpoints to keep, in addition to the best one; 0 keeps all."""
    eval_every: int = 100
    """Steps between evaluations on the validation split; 0 disables evaluation."""
    eval_windows: int = 64
    """Maximum number of validation windows per evaluation, over all processes."""
    log_every: int = 1
    """Steps between log entries in metrics.jsonl and the trackers."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"] if find_spec("tensorboard") else [])
    """Experiment trackers: tensorboard (the default if it is installed), wandb, trackio."""
    push_to_hub: Optional[str] = None
    """Hub repository `user/name` to push the adapter to after training (the best checkpoint if there are
    evaluations). Permissions and licenses are checked before the first step."""
    push_merged: bool = False
    """Push the base model with the adapter merged in, instead of the adapter alone."""
    hub_private: bool = False
    """Create the Hub repository as private. Adapters that may not be published can be pushed to a private one."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "gradient_accumulation_steps", "save_every", "log_every", "eval_windows"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("eval_every", "keep_checkpoints", "max_grad_norm"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise UserError(
                f"training.push_to_hub is {self.push_to_hub!r}.", "Give USER/NAME, or null to disable the push."
            )
        unknown = sorted(set(self.trackers) - {"tensorboard", "wandb", "trackio"})
        if unknown:
            raise UserError(
                f"training.trackers has {unknown[0]!r}.", "Choose from tensorboard, wandb, trackio, or give []."
            )


@dataclass
class OptimizerConfig:
    """AdamW with float32 states."""

    lr: float = 4e-6
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay on the adapter weights."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Exponential decay rates of the first and second moment."""

    def __post_init__(self) -> None:
        _at_least("optimizer.lr", self.lr, 0.0, above=True)
        _at_least("optimizer.weight_decay", self.weight_decay, 0.0)
        for beta in self.betas:
            _share("optimizer.betas", beta, below_one=True)


@dataclass
class SchedulerConfig:
    """Learning rate schedule: linear warm-up, then cosine decay."""

    num_warmup_steps: int = 100
    """Warm-up steps."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a fraction of the peak."""

    def __post_init__(self) -> None:
        _at_least("scheduler.num_warmup_steps", self.num_warmup_steps, 0)
        _share("scheduler.min_lr_ratio", self.min_lr_ratio)


@dataclass
class AdvancedConfig:
    """Memory and speed trade-offs."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


@dataclass
class RunConfig:
    """A training run."""

    run_dir: str = "checkpoints/expressive"
    """Output folder: config.yaml, metrics.jsonl, logs/ and checkpoints."""
    seed: int = 0
    """Seed of the adapter initialization, the data order and dropout."""
    resume_from_checkpoint: Optional[str] = None
    """Checkpoint to resume from; `latest` for the newest in run_dir (a fresh start if there is none)."""
    moshi_paths: MoshiPaths = field(default_factory=MoshiPaths)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    advanced: AdvancedConfig = field(default_factory=AdvancedConfig)

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)


def _at_least(name: str, value: float, minimum: float, *, above: bool = False) -> None:
    if not (minimum < value < math.inf if above else minimum <= value < math.inf):  # so that NaN fails
        raise UserError(f"{name} is {value}.", f"Give a number {'above' if above else 'of at least'} {minimum:g}.")


def _share(name: str, value: float, *, below_one: bool = False) -> None:
    if not (0.0 <= value < 1.0 if below_one else 0.0 <= value <= 1.0):
        raise UserError(f"{name} is {value}.", f"Give a number from 0 to {'below ' if below_one else ''}1.")
