"""Every option of a training run, once. `config_parser` reads them from a YAML file and the command line.

The text under a field is its `--help`. The fine-tuning guide's keys (`moshi_paths`, `dataset`, `lora`, `training`,
`optimizer`, `scheduler`, `advanced`) are valid as they stand.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal, Optional

from hf_csm.errors import UserError


# `Optional[...]` and not `... | None`: jsonargparse resolves these annotations at run time on Python 3.10 too.
# ruff: noqa: UP045

Trait = Literal["corpus", "emotion", "speaker", "language"]


@dataclass
class MoshiPaths:
    """The base model."""

    hf_repo_id: str = "kyutai/moshiko-pytorch-bf16"
    """Hub repository, or local folder in the same layout, of the base model, its Mimi codec and its tokenizer."""
    revision: Optional[str] = None
    """Branch, tag or commit of the Hub repository; null for its main branch."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the frozen base weights. Adapter weights are float32 in either case."""


@dataclass
class Source:
    """One table of codes in the mixture."""

    path: str
    """Table of codes: a folder, a Hub dataset `user/name`, or a JSONL manifest, which training encodes first."""
    weight: float = 1.0
    """Factor on the probability of drawing from this table, before `max_repeats`."""
    revision: Optional[str] = None
    """Branch, tag or commit of the Hub dataset; null for its main branch."""

    def __post_init__(self) -> None:
        _at_least("dataset.sources.weight", self.weight, 0.0, above=True)


@dataclass
class Balance:
    """How often each cell is drawn: `weight * seconds ** temperature`, normalised."""

    by: list[Trait] = field(default_factory=lambda: ["corpus", "emotion"])
    """A cell is the windows that agree in these; give fewer or more, such as [corpus, emotion, speaker]."""
    temperature: float = 0.5
    """1 draws emotions as recorded, 0 draws them equally often."""
    max_repeats: float = 4.0
    """Most passes over a small cell while the whole mixture is passed once; what it gives up goes to the others."""

    def __post_init__(self) -> None:
        if not self.by or len(set(self.by)) < len(self.by):
            raise UserError(f"dataset.balance.by is {self.by}.", "Name some of corpus, emotion, speaker, language.")
        _share("dataset.balance.temperature", self.temperature)
        _at_least("dataset.balance.max_repeats", self.max_repeats, 1.0)


@dataclass
class Replay:
    """Ordinary dialogues, mixed in so that the model keeps what it could do before. No filter or balance applies."""

    manifest_path: str
    """Table of codes, as in `sources`; its training split is used."""
    fraction: float
    """Share of the drawn windows that are from here."""


@dataclass
class DatasetConfig:
    """What the model hears and how it is told which emotion to speak with."""

    manifest_path: Optional[str] = None
    """Table of codes to train on: a folder, a Hub id or a JSONL manifest. Short for one entry of `sources`."""
    val_manifest_path: Optional[str] = None
    """Table of codes whose validation split is evaluated; null for the validation splits of the training tables."""
    sources: list[Source] = field(default_factory=list)
    """Tables of codes with their weights, to train on several at once."""
    duration_sec: float = 80.0
    """Longest window in seconds. Longer conversations are cut at this length, with a warning."""
    batch_size: int = 8
    """A micro-batch holds up to `batch_size * duration_sec` seconds of audio, padding included."""
    batch_by_length: bool = True
    """Put windows of like length together; false takes `batch_size` windows as they are drawn."""
    balance: Balance = field(default_factory=Balance)
    """Weights of the cells."""
    replay: Optional[Replay] = None
    """Ordinary dialogues to mix in; null for none."""
    emotions: Optional[list[str]] = None
    """Train on these emotions only; null for all. With `control: none` this gives one adapter per emotion."""
    languages: Optional[list[str]] = None
    """Train on these languages only, such as [en]; null for all."""
    speakers: Optional[list[str]] = None
    """Train on these speakers only, such as [ravdess-01]; null for all. Validation keeps its own."""
    control: Literal["prefix", "none"] = "prefix"
    """`prefix` names the emotion in the first frames of the text stream; `none` does not."""
    prefix_template: str = "({emotion})"
    """Text of the prefix."""
    prefix_dropout: float = 0.1
    """Share of the training windows without prefix, so that guidance is possible later."""

    def __post_init__(self) -> None:
        _at_least("dataset.duration_sec", self.duration_sec, 1.0)
        _at_least("dataset.batch_size", self.batch_size, 1)
        _share("dataset.prefix_dropout", self.prefix_dropout)
        if self.replay is not None:  # not in its own class: there, the parser would bury the message in its own
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
                "Put {emotion} where the emotion's name goes, and no other braces.",
            )
        for name in ("emotions", "languages", "speakers"):
            if getattr(self, name) == []:
                raise UserError(f"dataset.{name} is empty: nothing would be left.", "Name some, or null for all.")
        if self.manifest_path and self.sources:
            raise UserError(
                "dataset.manifest_path and dataset.sources are both given.",
                "Name all tables in dataset.sources, or empty it with --dataset.sources '[]'.",
            )

    def training_sources(self) -> list[Source]:
        """Return the tables to train on, from whichever of the two options names them."""
        if self.manifest_path:
            return [Source(self.manifest_path)]
        if not self.sources:
            raise UserError(
                "The run names no training data.",
                "Set dataset.manifest_path (or dataset.sources) to a folder that `hf-csm encode` wrote.",
            )
        return self.sources


@dataclass
class LoraSettings:
    """The adapter."""

    enable: bool = True
    """Only adapters are trained: false is an error."""
    rank: int = 128
    """Rank of every adapter matrix pair."""
    alpha: float = 256.0
    """The update is scaled by `alpha / rank`."""
    scaling: Optional[float] = None
    """The same scale said directly, as moshi does. Must equal `alpha / rank` if given."""
    dropout: float = 0.0
    """Dropout on the input of the adapters."""
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Modules to adapt in the temporal and the depth transformer, by their common or by moshi's own names, or
    `all-linear` for every linear layer, heads included."""

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 1)
        _at_least("lora.alpha", self.alpha, 0.0, above=True)
        _share("lora.dropout", self.dropout, below_one=True)
        if not self.enable:
            raise UserError("lora.enable is false.", "Set it to true: training the whole base model is not supported.")
        if self.scaling is not None and abs(self.scaling - self.alpha / self.rank) > 1e-6:
            raise UserError(
                f"lora.scaling is {self.scaling:g}, but lora.alpha / lora.rank is {self.alpha / self.rank:g}.",
                "Leave lora.scaling out, or make the three agree.",
            )


@dataclass
class LossConfig:
    """Weight of each token in the loss; the sum is divided by the weights of the whole optimizer step."""

    text_weight: float = 17.0
    """Weight of a text token. 17 gives text as much of a frame's loss as the audio with the weights below."""
    text_padding_weight: float = 0.5
    """Factor on that weight where the target is text padding."""
    first_codebook_weight: float = 10.0
    """Weight of codebook 0, the semantic one."""
    other_codebooks_weight: float = 1.0
    """Weight of each other codebook, where timbre and prosody live."""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            _at_least(f"loss.{option.name}", getattr(self, option.name), 0.0)


@dataclass
class TrainingConfig:
    """Length of the run and what happens along the way."""

    max_steps: int = 3000
    """Optimizer steps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of each process in an optimizer step."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    save_every: int = 500
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep, besides the one with the lowest evaluation loss; 0 keeps all."""
    eval_every: int = 100
    """Steps between evaluations on the validation split; 0 for none."""
    eval_windows: int = 64
    """Most validation windows in an evaluation, all processes together."""
    log_every: int = 1
    """Steps between lines in metrics.jsonl and the trackers."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics also go: tensorboard, wandb, trackio."""
    push_to_hub: Optional[str] = None
    """Hub repository `user/name` that gets the adapter at the end, the best one if there are evaluations. Whether it
    may be pushed there is checked before the first step."""
    hub_private: bool = False
    """Make that repository a private one. What may not be published can be kept there."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "gradient_accumulation_steps", "save_every", "log_every", "eval_windows"):
            _at_least(f"training.{name}", getattr(self, name), 1)
        for name in ("eval_every", "keep_checkpoints", "max_grad_norm"):
            _at_least(f"training.{name}", getattr(self, name), 0)
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise UserError(f"training.push_to_hub is {self.push_to_hub!r}.", "Give USER/NAME, or null for no push.")
        unknown = sorted(set(self.trackers) - {"tensorboard", "wandb", "trackio"})
        if unknown:
            raise UserError(
                f"training.trackers has {unknown[0]!r}.", "Choose from tensorboard, wandb, trackio, or give []."
            )


@dataclass
class OptimizerConfig:
    """The optimizer."""

    name: Literal["adamw"] = "adamw"
    """AdamW in float32."""
    lr: float = 4e-6
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay on the adapter weights."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the gradient's first and second moment."""

    def __post_init__(self) -> None:
        _at_least("optimizer.lr", self.lr, 0.0, above=True)
        _at_least("optimizer.weight_decay", self.weight_decay, 0.0)
        for beta in self.betas:
            _share("optimizer.betas", beta, below_one=True)


@dataclass
class SchedulerConfig:
    """Learning rate over the run: linear warm-up, then half a cosine."""

    num_warmup_steps: int = 100
    """Steps from 0 to the peak."""
    min_lr_ratio: float = 0.0
    """Share of the peak that is left at the last step."""

    def __post_init__(self) -> None:
        _at_least("scheduler.num_warmup_steps", self.num_warmup_steps, 0)
        _share("scheduler.min_lr_ratio", self.min_lr_ratio)


@dataclass
class AdvancedConfig:
    """Memory against speed."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""


@dataclass
class RunConfig:
    """A training run."""

    run_dir: str = "checkpoints/expressive"
    """Folder of the run: config.yaml, metrics.jsonl, logs/ and the checkpoints."""
    seed: int = 0
    """Seed of the adapter's first weights, the order of the data and dropout."""
    resume_from_checkpoint: Optional[str] = None
    """Checkpoint to go on from; `latest` for the newest in run_dir, or a fresh start if there is none."""
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
    if not (minimum < value < math.inf if above else minimum <= value < math.inf):  # written so that NaN fails
        raise UserError(f"{name} is {value}.", f"Give a number {'above' if above else 'of at least'} {minimum:g}.")


def _share(name: str, value: float, *, below_one: bool = False) -> None:
    if not (0.0 <= value < 1.0 if below_one else 0.0 <= value <= 1.0):
        raise UserError(f"{name} is {value}.", f"Give a number from 0 to {'below ' if below_one else ''}1.")
