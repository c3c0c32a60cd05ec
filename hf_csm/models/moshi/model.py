"""Load Moshi's language model, moshi's `LMModel`, and score windows of codes with it."""

from __future__ import annotations

import pickle

import torch
from moshi.models.lm import LMModel
from safetensors import SafetensorError

from hf_csm.errors import UserError
from hf_csm.models.family import Layout, SpeechLM, TokenNLL
from hf_csm.models.moshi.checkpoint import MoshiCheckpoint


IGNORED_TARGET = -100


class MoshiLM(SpeechLM):
    """Moshi as a `SpeechLM`: scores windows of codes, teacher forced.

    Attributes:
        lm: moshi's `LMModel`, or PEFT's wrapper of it.
        layout: its streams, for the data.
    """

    def __init__(self, lm: LMModel, name_or_path: str = "", revision: str | None = None):
        super().__init__()
        # PEFT writes these to adapter_config.json as the base model.
        lm.name_or_path = name_or_path or None
        lm.revision = revision
        self.lm: torch.nn.Module = lm
        self.layout = layout_of(lm)

    def forward(self, codes: torch.Tensor) -> TokenNLL:
        """Return the negative log-likelihood of each token that Moshi predicts, given all tokens before it.

        A token is predicted from the earlier frames, and within its frame from text and then the codebooks in order,
        each stream shifted by its delay. A stream's last `delay` frames are not scored: end windows with
        `layout.max_delay` frames of `-1`.

        Args:
            codes: `[B, K, T]`, int64, `-1` for no token.

        Raises:
            ValueError: `codes` is not `[B, K, T]` with the model's K, or not int64.
        """
        layout = self.layout
        if codes.dim() != 3 or codes.shape[1] != layout.num_streams or codes.shape[2] == 0:
            raise ValueError(f"codes must be [B, {layout.num_streams}, T] with T > 0, not {list(codes.shape)}")
        if codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64, not {codes.dtype}")
        output = self.lm(codes)
        last = layout.num_predicted_streams
        mask = torch.zeros_like(codes, dtype=torch.bool)
        mask[:, :1] = output.text_mask
        mask[:, 1:last] = output.mask
        nll = torch.cat(
            [
                masked_nll(output.text_logits, codes[:, :1], output.text_mask),
                masked_nll(output.logits, codes[:, 1:last], output.mask),
                codes.new_zeros(codes[:, last:].shape, dtype=torch.float32),
            ],
            dim=1,
        )
        return TokenNLL(nll, mask)


def masked_nll(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of `targets`, `[B, K, T]` in float32, 0 where `mask` is false.

    Logits outside the mask may be NaN (moshi fills in NaN where a delay leaves no context): values
    and gradients of the other tokens are not affected.

    Args:
        logits: `[B, K, T, V]`.
        targets: `[B, K, T]`; any value where `mask` is false.
        mask: `[B, K, T]`.
    """
    # One stream at a time, so that only one is in float32 with its softmax.
    streams = []
    for k in range(targets.shape[1]):
        inside = mask[:, k]
        safe_logits = torch.where(inside[..., None], logits[:, k], 0).float()
        safe_targets = torch.where(inside, targets[:, k], IGNORED_TARGET)
        streams.append(
            torch.nn.functional.cross_entropy(
                safe_logits.flatten(0, 1), safe_targets.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
            ).view_as(inside)
        )
    return torch.stack(streams, dim=1)


def layout_of(lm: LMModel) -> Layout:
    """Return the streams of `lm`."""
    return Layout(
        delays=tuple(lm.delays),
        num_predicted_codebooks=lm.dep_q,
        num_user_codebooks=lm.n_q - lm.dep_q,
        text_padding_id=lm.text_padding_token_id,
        end_of_text_padding_id=lm.end_of_text_padding_id,
        text_card=lm.text_card,
        card=lm.card,
    )


def load_moshi(
    checkpoint: MoshiCheckpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    gradient_checkpointing: bool = False,
) -> MoshiLM:
    """Load the language model of `checkpoint`.

    Args:
        gradient_checkpointing: keep only each layer's input for the backward pass and compute the rest again.

    Raises:
        UserError: the weights are truncated or do not fit the config, or the checkpoint is an adapter.
    """
    if checkpoint.lora_weights is not None:
        raise UserError(
            f"{checkpoint.name_or_path} is a LoRA adapter, not a base model.",
            "Name the base model instead: the repository or folder of `moshi_name` in its config.json.",
        )
    try:
        lm = checkpoint.get_moshi(
            device=device, dtype=dtype, lm_kwargs_overrides={"gradient_checkpointing": gradient_checkpointing}
        )
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint.moshi_weights} is damaged or truncated: {error}", "Copy or download it again."
        ) from error
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"{checkpoint.moshi_weights} does not fit the config.json of {checkpoint.name_or_path}: "
            + (" ".join(str(error).split())[:300] or type(error).__name__),
            "Take the weights and config.json from the same place.",
        ) from error
    return MoshiLM(lm, checkpoint.name_or_path, checkpoint.revision)
