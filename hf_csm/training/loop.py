"""The training loop: config in, checkpoints and metrics out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed
from tqdm import tqdm

from hf_csm.config import RunConfig
from hf_csm.config_parser import dump_run_config
from hf_csm.errors import UserError, require_extra
from hf_csm.mixture.collate import Batch, collate
from hf_csm.mixture.loader import MixtureLoader, lay_out_row, validation_batches
from hf_csm.mixture.provenance import corpora_of, count_windows, with_earlier, write_corpora
from hf_csm.mixture.report import describe_mixture
from hf_csm.mixture.windows import held_out_table, training_table
from hf_csm.models.family import NO_TOKEN, Family, SpeechLM
from hf_csm.training.checkpoint import (
    Progress,
    checkpoint_path,
    find_checkpoint_to_resume,
    load_state,
    mark_best,
    options_of,
    remove_old_checkpoints,
    save_checkpoint,
)
from hf_csm.training.evaluate_loss import evaluate_loss
from hf_csm.training.interrupt import StopRequest
from hf_csm.training.loss import stream_means, stream_sums, token_weights, weighted_sum
from hf_csm.training.manifests import encode_manifests
from hf_csm.training.metrics_log import MetricsLog
from hf_csm.training.optim import build_optimizer, learning_rate, set_learning_rate
from hf_csm.units import frames_to_seconds


logger = get_logger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Measurements of an optimizer step, over all micro-batches and processes.

    Attributes:
        loss: weighted mean negative log-likelihood, nats.
        streams: mean of each of `Family.stream_names`, nats.
        grad_norm: before clipping.
        num_frames: frames with tokens, padding excluded.
        num_padded_frames: frames of padding in the micro-batches.
        stop_signal: signal that a process has received, 0 for none.
    """

    loss: float
    streams: dict[str, float]
    grad_norm: float
    num_frames: int
    num_padded_frames: int
    stop_signal: int


def train(config: RunConfig, family: Family) -> Path:
    """Train an adapter with these options and return the last checkpoint.

    Raises:
        UserError: bad configuration or data, or a loss that is not finite.
        SystemExit: the run was interrupted; its checkpoint is written.
    """
    run_dir = Path(config.run_dir)
    resume_path = find_checkpoint_to_resume(run_dir, config.resume_from_checkpoint)
    accelerator = _build_accelerator(config, run_dir)
    if config.resume_from_checkpoint == "latest" and resume_path is None:
        logger.warning(f"{run_dir} holds no checkpoint to resume from: the run starts at step 0.")
    set_seed(config.seed)

    base = family.find_checkpoint(config.moshi_paths.hf_repo_id, config.moshi_paths.revision)
    codec_sha256 = family.codec_sha256(base)
    dataset = encode_manifests(config, family, base, accelerator)
    train_table = training_table(dataset, codec_sha256)
    if train_table.num_cut:
        logger.warning(
            f"{train_table.num_cut} of {len(train_table)} windows are longer than dataset.duration_sec "
            f"({config.dataset.duration_sec:g} s) and are truncated."
        )
    validation_table = held_out_table(dataset, "validation", codec_sha256)

    model = family.load_lm(
        base,
        device="cpu" if accelerator.device.type == "cpu" else accelerator.device,  # safetensors rejects "cpu:0"
        dtype=getattr(torch, config.moshi_paths.dtype),
        gradient_checkpointing=config.advanced.gradient_checkpointing,
    )
    family.add_lora(
        model,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        target_modules=config.lora.target_modules,
        dropout=config.lora.dropout,
        seed=config.seed,
    )
    if resume_path is not None:
        family.load_adapter(model, resume_path / "adapter")
    model.train()
    optimizer = build_optimizer(family.adapter_parameters(model), config.optimizer)
    lay_out = partial(family.lay_out, layout=model.layout, tokenize=family.load_tokenizer(base).encode)
    loader = MixtureLoader(
        train_table,
        model.layout,
        lay_out,
        dataset,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    set_seed(config.seed + accelerator.process_index)  # dropout differs between processes
    forward, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    if resume_path is not None:
        progress, was = load_state(resume_path, optimizer, accelerator.process_index)
        if checkpoint_path(run_dir, progress.best_step).is_dir():
            if accelerator.is_main_process:
                mark_best(run_dir, progress.best_step)  # a run may be killed between checkpoint and link
        else:  # a run that resumes in another folder has no best yet
            progress.best_step, progress.best_loss = -1, float("inf")
        changed = {name: value for name, value in options_of(config).items() if was.get(name) != value}
        if changed:
            text = ", ".join(f"{name} {was.get(name)} -> {value}" for name, value in changed.items())
            logger.warning(f"This run differs from the run that wrote {resume_path}: {text}.")
    accelerator.init_trackers("hf-csm")
    log = MetricsLog(run_dir / "metrics.jsonl", accelerator, None if resume_path is None else progress.step)
    if accelerator.is_main_process:
        (run_dir / "config.yaml").write_text(dump_run_config(config), encoding="utf-8")
        corpora = count_windows(corpora_of(dataset), train_table)
        write_corpora(with_earlier(corpora, resume_path.resolve().parent) if resume_path else corpora, run_dir)
    tables = {"train": train_table, "validation": validation_table}
    accelerator.print(describe_mixture(loader.groups, loader.probabilities, dataset, tables).render())
    trained = sum(parameter.numel() for parameter in family.adapter_parameters(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    accelerator.print(f"{trained:,} of {total:,} weights are trained ({trained / total:.2%}).")

    def read(rows: list[int]) -> Batch:
        windows = [lay_out_row(validation_table, row, lay_out, config.dataset) for row in rows]
        return collate(windows, model.layout)

    if config.training.eval_every and not len(validation_table):
        raise UserError(
            "The validation split has no windows.",
            "Name a table that has some with dataset.val_manifest_path, or set training.eval_every to 0.",
        )
    eval_batches = validation_batches(validation_table, config.dataset, max_windows=config.training.eval_windows)
    base_losses: dict[str, float] = {}

    def evaluate() -> dict[str, float]:
        score = partial(evaluate_loss, family, model, eval_batches, read, config.loss, accelerator)
        if not base_losses:  # the base does not change
            with family.adapter_disabled(model):
                base_losses.update(score("eval_base_"))
        return score("eval_") | base_losses

    save = partial(save_checkpoint, run_dir, progress, family, model, base, optimizer, config, accelerator)
    try:
        return _run(
            config, family, run_dir, accelerator, model, forward, optimizer, loader, progress, log, evaluate, save
        )
    finally:
        accelerator.end_training()


def _run(
    config: RunConfig,
    family: Family,
    run_dir: Path,
    accelerator: Accelerator,
    model: SpeechLM,
    forward: Callable,
    optimizer: torch.optim.Optimizer,
    loader: MixtureLoader,
    progress: Progress,
    log: MetricsLog,
    evaluate: Callable[[], dict[str, float]],
    save: Callable[[], Path],
) -> Path:
    """Step, evaluate and save until the last step or a signal; return the last checkpoint."""
    options = config.training
    resumed_step = progress.step
    batches = loader.batches(start=progress.num_micro_batches)
    stop_signal = 0
    checkpoint = run_dir
    bar = tqdm(
        total=options.max_steps,
        initial=progress.step,
        desc="train",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    with StopRequest() as stop, bar:
        while True:
            step = progress.step
            is_last = step >= options.max_steps  # max_steps may be lower than in the resumed run

            # every eval_every steps: evaluate on the validation split
            is_due = options.eval_every > 0 and (step % options.eval_every == 0 or is_last)
            if is_due and progress.evaluated_step != step and not stop_signal:
                losses = evaluate()
                log.write(step, losses)
                progress.evaluated_step, progress.evaluated_loss = step, losses["eval_loss"]
                bar.set_postfix_str(f"eval_loss {losses['eval_loss']:.4f}, base {losses['eval_base_loss']:.4f}")

            # every save_every steps: write a checkpoint
            if is_last or stop_signal or (step % options.save_every == 0 and step > resumed_step):
                is_best = progress.evaluated_step == step and progress.evaluated_loss < progress.best_loss
                if is_best:
                    progress.best_step, progress.best_loss = step, progress.evaluated_loss
                checkpoint = save()
                if accelerator.is_main_process:
                    if is_best:
                        mark_best(run_dir, step)
                    remove_old_checkpoints(run_dir, options.keep_checkpoints, progress.best_step)
            if stop_signal:
                logger.warning(f"Interrupted: {checkpoint} is written. Continue with --resume-from-checkpoint latest.")
                raise SystemExit(128 + stop_signal)
            if is_last:
                return checkpoint

            # one optimizer step
            start = time.perf_counter()
            rate = learning_rate(step, options.max_steps, config.optimizer.lr, config.scheduler)
            set_learning_rate(optimizer, rate)
            result = train_step(batches, family, model, forward, optimizer, accelerator, config, stop)
            progress.step += 1
            progress.num_micro_batches += options.gradient_accumulation_steps * accelerator.num_processes
            stop_signal = result.stop_signal
            duration_s = time.perf_counter() - start

            bar.update()
            if progress.step % options.log_every == 0 or progress.step == options.max_steps:
                num_tokens = result.num_frames * model.layout.num_predicted_streams
                log.write(
                    progress.step,
                    {
                        "loss": result.loss,
                        **result.streams,
                        "lr": rate,
                        "grad_norm": result.grad_norm,
                        "tokens_per_s": num_tokens / duration_s,
                        "audio_s": frames_to_seconds(result.num_frames),
                        "padding": result.num_padded_frames / (result.num_frames + result.num_padded_frames),
                    },
                )
                bar.set_description(f"train, loss {result.loss:.4f}")


def train_step(
    batches: Iterator[Batch],
    family: Family,
    model: SpeechLM,
    forward: Callable,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    config: RunConfig,
    stop: StopRequest | None = None,
) -> StepResult:
    """Take one optimizer step over the next micro-batches of every process.

    All micro-batches are collected first, because the loss of each is divided by the sum of all weights: the gradient
    equals that of one large batch, whatever the number of micro-batches.

    Raises:
        UserError: the loss or the norm of the gradient is not finite; no weight has changed.
    """
    accumulation_steps = config.training.gradient_accumulation_steps
    collected = [next(batches).to(accelerator.device) for _ in range(accumulation_steps)]
    masks = [family.stream_masks(batch.codes, batch.num_given, model.layout) for batch in collected]
    weights = [token_weights(mask, family.stream_weights(config.loss)) for mask in masks]
    denominator = accelerator.reduce(torch.stack([weight.sum() for weight in weights]).sum(), reduction="sum")

    totals = torch.zeros(5 + 2 * len(family.stream_names), dtype=torch.float64, device=accelerator.device)
    for i, (batch, mask, weight) in enumerate(zip(collected, masks, weights, strict=True)):
        is_last = i == accumulation_steps - 1
        with nullcontext() if is_last else accelerator.no_sync(forward):
            output = forward(batch.codes)
            loss = weighted_sum(output, weight) / denominator
            # Gradients are averaged over processes; the denominator is already global.
            accelerator.backward(loss * accelerator.num_processes)
        has_token = (batch.codes != NO_TOKEN).any(1)
        totals[0] += loss.detach().double()
        totals[1] += has_token.sum()
        totals[2] += has_token.numel() - has_token.sum()
        totals[5:] += stream_sums(output, mask).flatten().double()
    if stop is not None and stop.signal_number:  # one process may receive it; all must stop after the same step
        totals[3 if stop.signal_number == signal.SIGINT else 4] = 1
    totals = accelerator.reduce(totals, reduction="sum").cpu()
    max_norm = config.training.max_grad_norm or float("inf")
    grad_norm = accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    for name, value in (("loss", totals[0]), ("gradient norm", grad_norm)):
        if not value.isfinite():
            optimizer.zero_grad()
            raise UserError(
                f"The {name} is {float(value)} in a step that began with window {collected[0].ids[0]}.",
                "No weight was changed. Resume with a lower optimizer.lr, or check that window's codes.",
            )
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(
        loss=float(totals[0]),
        streams=stream_means(family.stream_names, totals[5:]),
        grad_norm=float(grad_norm),
        num_frames=int(totals[1]),
        num_padded_frames=int(totals[2]),
        stop_signal=signal.SIGTERM if totals[4] else signal.SIGINT if totals[3] else 0,
    )


def _build_accelerator(config: RunConfig, run_dir: Path) -> Accelerator:
    for tracker in config.training.trackers:
        require_extra("trackers" if tracker == "tensorboard" else tracker, "training.trackers", tracker)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        log_with=config.training.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "logs")),
    )
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in supported:
        raise UserError(
            f"Accelerate is set to {accelerator.distributed_type.value}, which shards the base model: not supported.",
            "Launch with accelerate_configs/multi_gpu.yaml: each GPU then holds the whole base model.",
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"Accelerate is set to {accelerator.mixed_precision}.", "Set mixed_precision to bf16 or no.")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"Accelerate is set to accumulate over {accelerator.gradient_accumulation_steps} steps.",
            "Remove that option and set training.gradient_accumulation_steps.",
        )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world_size:
        raise UserError(
            f"{world_size} processes were started, but Accelerate uses {accelerator.num_processes}.",
            "On a machine without GPU, set ACCELERATE_USE_CPU=true for torchrun.",
        )
    return accelerator
