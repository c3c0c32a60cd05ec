"""A tiny Moshi with Mimi and tokenizer, a few hundred thousand weights, in the official file layout.

It is accepted wherever a base model is, so the whole workflow runs on a laptop in seconds. The weights are random;
only the codec is fitted, so that different sounds have different codes.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import get_mimi
from safetensors.torch import save_file

from hf_csm.data.labels import EMOTIONS
from hf_csm.units import FRAME_RATE, SAMPLE_RATE, SAMPLES_PER_FRAME


MOSHI_NAME = "model.safetensors"
MIMI_NAME = "mimi.safetensors"
MIMI_CONFIG_NAME = "mimi.json"
TOKENIZER_NAME = "tokenizer.model"

TOKENIZER_TEXT = (
    "kids are talking by the door",
    "dogs are sitting by the door",
    "it's eleven o'clock",
    "that is exactly what happened",
    "i'm on my way to the meeting",
    "i wonder what this is about",
    "the airplane is almost full",
    "maybe tomorrow it will be cold",
    "i would like a new alarm clock",
    "i think i have a doctor's appointment",
    "don't forget a jacket",
    "i think i've seen this before",
    "the surface is slick",
    "we'll stop in a couple of minutes",
    "hello how are you doing today",
    "yes no please thank you and good bye",
)
"""Training text of the tokenizer: the sentences of RAVDESS and CREMA-D, and small talk."""


def write_tiny_moshi(
    folder: Path,
    *,
    seed: int = 0,
    dim: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    depformer_dim: int = 32,
    depformer_num_layers: int = 2,
    card: int = 128,
    num_mimi_codebooks: int = 16,
    context: int = 3000,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write the checkpoint to `folder`, replacing its content, and return `folder`.

    The same arguments give the same weights. The caller's random state is unchanged.

    Args:
        card: number of codes of a codebook, in Mimi and in the language model.
        num_mimi_codebooks: codebooks of the codec; the language model uses the first 8.
        dtype: of the language model's weights in the file.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        text_card = write_tiny_tokenizer(beside / TOKENIZER_NAME)
        config = tiny_config(
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            depformer_dim=depformer_dim,
            depformer_num_layers=depformer_num_layers,
            card=card,
            text_card=text_card,
            context=context,
        )
        mimi_config = tiny_mimi_config(card=card, num_codebooks=num_mimi_codebooks)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            lm = LMModel(device="cpu", dtype=torch.float32, **lm_arguments(config))
            mimi = get_mimi(None, mimi_config, num_codebooks=num_mimi_codebooks)
            _fit_codec(mimi)
        save_file(
            {name: weight.to(dtype).contiguous() for name, weight in lm.state_dict().items()}, beside / MOSHI_NAME
        )
        save_file({name: weight.contiguous() for name, weight in mimi.state_dict().items()}, beside / MIMI_NAME)
        (beside / MIMI_CONFIG_NAME).write_text(json.dumps(mimi_config, indent=2) + "\n")
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        beside.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def tiny_config(
    *,
    dim: int,
    num_layers: int,
    num_heads: int,
    depformer_dim: int,
    depformer_num_layers: int,
    card: int,
    text_card: int,
    context: int,
) -> dict[str, Any]:
    """Return the `config.json` of a small model with the architecture of Moshi 7B."""
    return {
        "model_type": "moshi",
        "moshi_name": MOSHI_NAME,
        "mimi_name": MIMI_NAME,
        "mimi_config_name": MIMI_CONFIG_NAME,
        "tokenizer_name": TOKENIZER_NAME,
        "dim": dim,
        "text_card": text_card,
        "existing_text_padding_id": 3,
        "n_q": 16,
        "dep_q": 8,
        "card": card,
        "num_heads": num_heads,
        "num_layers": num_layers,
        "hidden_scale": 4.125,
        "causal": True,
        "layer_scale": None,
        "context": context,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": depformer_dim,
        "depformer_dim_feedforward": int(4.125 * depformer_dim),
        "depformer_num_heads": 4,
        "depformer_num_layers": depformer_num_layers,
        "depformer_layer_scale": None,
        "depformer_multi_linear": True,
        "depformer_context": 8,
        "depformer_max_period": 10000,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": [0, 0, *[1] * 7, 0, *[1] * 7],
    }


def lm_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `LMModel` in a `config.json`."""
    names = ("model_type", "moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name")
    return {key: value for key, value in config.items() if key not in names}


def tiny_mimi_config(*, card: int, num_codebooks: int) -> dict[str, Any]:
    """Return the config of a Mimi with the true rates and few channels: 1,920 samples of 24 kHz a frame.

    The context is also that of Mimi, 10 s. Beyond it, codes of the whole window and of streaming differ slightly, as
    in Mimi: a streaming step writes two positions, so the first of them loses the oldest position.
    """
    dimension = 32
    return {
        "sample_rate": SAMPLE_RATE,
        "channels": 1,
        "frame_rate": FRAME_RATE,
        "seanet": {
            "channels": 1,
            "dimension": dimension,
            "causal": True,
            "n_filters": 4,
            "n_residual_layers": 1,
            "activation": "ELU",
            "compress": 2,
            "dilation_base": 2,
            "disable_norm_outer_blocks": 0,
            "kernel_size": 7,
            "residual_kernel_size": 3,
            "last_kernel_size": 3,
            "norm": "none",
            "pad_mode": "constant",
            "ratios": [8, 6, 5, 4],
            "true_skip": True,
        },
        "quantizer": {
            "dimension": 16,
            "n_q": num_codebooks,
            "bins": card,
            "input_dimension": dimension,
            "output_dimension": dimension,
        },
        "transformer": {
            "d_model": dimension,
            "num_heads": 4,
            "num_layers": 1,
            "causal": True,
            "layer_scale": 0.01,
            "context": 250,
            "conv_layout": True,
            "max_period": 10000,
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": 64,
            "input_dimension": dimension,
            "output_dimensions": [dimension],
        },
    }


def write_tiny_tokenizer(path: Path) -> int:
    """Train a SentencePiece model on `TOKENIZER_TEXT` and the emotion names; return its number of tokens.

    Unseen characters become bytes, because the unknown token is Moshi's end of padding.
    """
    names = " ".join(EMOTIONS)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TOKENIZER_TEXT, names] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=512,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def _fit_codec(mimi: MimiModel, duration_s: float = 160.0) -> None:
    """Fit the codebooks to the latents of varied sounds; scale latents to 1 and the decoder to the level of speech."""
    for name, weight in mimi.encoder.named_parameters():
        if name.endswith("bias"):  # a constant offset would dominate the latents
            weight.zero_()
    audio = _varied_audio(duration_s)
    mimi.encoder.model[-1].conv.conv.weight.div_(mimi.encoder(audio).std())
    latents = mimi.encode_to_latent(audio, quantize=False)  # [B, D, T]
    flat = latents.transpose(1, 2).flatten(0, 1)  # [B * T, D]
    for quantizer in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        _whiten(quantizer, flat)
        residual = quantizer.input_proj(latents).transpose(1, 2).flatten(0, 1)
        for layer in quantizer.vq.layers:
            residual = residual - _fit_codebook(layer._codebook, residual)
    last_conv = mimi.decoder.model[-1].conv.conv
    loudness = mimi.decode(mimi.encode(audio[:2])).std()
    last_conv.weight.mul_(0.1 / loudness)
    last_conv.bias.zero_()


def _varied_audio(duration_s: float, num_clips: int = 16) -> torch.Tensor:
    """Return `[num_clips, 1, S]`: buzzes of drifting pitch, timbre and loudness, breath noise and near silence."""
    num_samples = round(duration_s * FRAME_RATE / num_clips) * SAMPLES_PER_FRAME
    time_s = torch.arange(num_samples) / SAMPLE_RATE
    clips = []
    for _ in range(num_clips):
        pitch_hz, depth, pace_hz, tilt, loudness = torch.rand(5).tolist()
        drift = 1 + 0.3 * depth * torch.sin(2 * math.pi * (0.2 + 2 * pace_hz) * time_s)
        phase = 2 * math.pi * torch.cumsum((80 + 320 * pitch_hz) * drift, 0) / SAMPLE_RATE
        buzz = sum(torch.sin(k * phase) / k ** (0.5 + 1.5 * tilt) for k in range(1, 9))
        syllables = torch.sin(2 * math.pi * (1 + 4 * pace_hz) * time_s).clamp(min=0) ** 2
        clip = 0.4 * loudness * buzz * syllables + 0.1 * depth * torch.randn(num_samples) * (1 - syllables) ** 4
        clips.append(clip + 1e-3 * torch.randn(num_samples))
    return torch.stack(clips)[:, None]


def _whiten(quantizer: Any, latents: torch.Tensor) -> None:
    """Set the projection of `quantizer` to the principal components of `latents [N, D]`, whitened.

    The projection has no bias, so the direction of the mean is removed: a large common part would reduce the precision
    of the nearest code, and the codes of a whole window and of streaming would differ.
    """
    mean = latents.mean(0)
    mean = mean / mean.norm()
    variance, directions = torch.linalg.eigh(torch.cov((latents - (latents @ mean)[:, None] * mean).T))
    scale = 1 / (variance.clamp(min=0).sqrt() + 0.05 * variance.max().sqrt())
    weight = (directions * scale).T.flip(0)[: quantizer.dimension]
    weight = weight - (weight @ mean)[:, None] * mean
    quantizer.input_proj.weight.copy_(weight[..., None])
    quantizer.output_proj.weight.copy_(torch.linalg.pinv(weight)[..., None])


def _fit_codebook(codebook: Any, vectors: torch.Tensor, num_steps: int = 4) -> torch.Tensor:
    """Move the codes into `vectors [N, D]` by a few steps of k-means; return the code vector of each, `[N, D]`."""
    codes = vectors[torch.randperm(len(vectors))[: codebook.codebook_size]].clone()
    for _ in range(num_steps):
        nearest = torch.cdist(vectors, codes).argmin(1)
        counts = torch.bincount(nearest, minlength=len(codes))
        means = torch.zeros_like(codes).index_add_(0, nearest, vectors) / counts.clamp(min=1)[:, None]
        codes = torch.where(counts[:, None] > 0, means, codes)
    codebook.embedding_sum.copy_(codes)
    codebook.cluster_usage.fill_(1)
    codebook._initialized.fill_(1)
    codebook.register_buffer("_embedding", None, persistent=False)
    return codes[torch.cdist(vectors, codes).argmin(1)]
