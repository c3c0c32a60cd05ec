"""A model family that is not Moshi: a recurrent model over one codebook each way, with files of its own.

It shows what the record in `hf_csm.models.family` asks of a family: nothing but these functions.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_csm.models.family import NO_TOKEN, Family, Frame, Layout, RuntimeAdapter, SpeechLM, TokenNLL, Window
from hf_csm.units import SAMPLES_PER_FRAME, frame_at


LAYOUT = Layout((0, 0, 0), 1, 1, text_padding_id=0, end_of_text_padding_id=0, text_card=64, card=32)
DIM = 16


class ToyNet(torch.nn.Module):
    """All streams of a frame to the logits of the next frame's text and code."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.ModuleList([torch.nn.Embedding(card + 1, DIM) for card in (64, 32, 32)])
        self.recurrent = torch.nn.GRU(DIM, DIM, batch_first=True)
        self.hidden = torch.nn.Linear(DIM, DIM)
        self.heads = torch.nn.Linear(DIM, 64 + 32)

    def forward(self, codes: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = sum(embed(stream + 1) for embed, stream in zip(self.embed, codes.unbind(1), strict=True))
        x, state = self.recurrent(x, state)
        return self.heads(x + self.hidden(x)), state


class ToyLM(SpeechLM):
    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self.layout = net, LAYOUT

    def forward(self, codes: torch.Tensor) -> TokenNLL:
        before = torch.nn.functional.pad(codes, (1, -1), value=NO_TOKEN)
        logits = self.net(before)[0].split([64, 32], dim=-1)
        mask = codes != NO_TOKEN
        mask[:, 2] = False
        nll = torch.zeros(codes.shape)
        for stream, scores in enumerate(logits):
            targets = codes[:, stream].clamp(min=0)
            nll[:, stream] = torch.nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
        return TokenNLL(nll * mask, mask)


@dataclass
class ToyCheckpoint:
    name_or_path: str
    revision: str | None = None
    lora_weights: Path | None = None
    is_local: bool = True


class ToyCodec:
    """The code of a frame is its loudness."""

    num_codebooks, device = 1, torch.device("cpu")

    def encode(self, waveforms):
        frames = [waveform.reshape(2, 1, -1, SAMPLES_PER_FRAME).std(axis=-1) for waveform in waveforms]
        return [np.clip(loudness * 320, 0, 31).astype(np.int16) for loudness in frames]


class ToyTokenizer:
    def encode(self, text):
        return [1 + ord(character) % 63 for character in text]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def write_tiny_checkpoint(folder, *, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(ToyNet().state_dict(), folder / "toy.safetensors")
    return folder


def find_checkpoint(name, revision=None):
    adapter = Path(name, "toy_adapter.json")
    if adapter.is_file():
        return ToyCheckpoint(json.loads(adapter.read_text())["base"], None, Path(name, "delta.safetensors"))
    return ToyCheckpoint(str(Path(name).absolute()), revision)


def load_net(checkpoint):
    net = ToyNet()
    net.load_state_dict(load_file(Path(checkpoint.name_or_path, "toy.safetensors")))
    return net


def load_lm(checkpoint, *, device, dtype, gradient_checkpointing=False):
    return ToyLM(load_net(checkpoint).to(device, dtype))


def lay_out(row, layout, tokenize, *, prefix=None, max_frames=None):
    codes = np.asarray(row["codes"])[:, :, :max_frames]
    streams = np.stack([np.zeros(codes.shape[2], dtype=np.int64), codes[0, 0], codes[1, 0]])
    for word in row["words"]:
        if word["channel"] == 0 and frame_at(word["start_s"]) < codes.shape[2]:
            streams[0, frame_at(word["start_s"])] = tokenize(word["word"])[0]
    tokens = tokenize(prefix) if prefix else []
    streams[0, : len(tokens)] = tokens
    return Window(row["id"], streams, len(tokens))


def stream_masks(codes, num_given, layout):
    masks = torch.zeros(2, *codes.shape, dtype=torch.bool)
    frames = torch.arange(codes.shape[2])
    masks[0, :, 0] = (codes[:, 0] != NO_TOKEN) & (frames >= num_given[:, None])
    masks[1, :, 1] = codes[:, 1] != NO_TOKEN
    return masks


def add_lora(model, *, rank, alpha, target_modules, dropout=0.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["hidden"])
        model.net = peft.get_peft_model(model.net, config)
    return model


def save_adapter(model, folder):
    model.net.save_pretrained(folder)


def load_adapter(model, folder):
    if not isinstance(model.net, peft.PeftModel):
        config = peft.PeftConfig.from_pretrained(folder)
        add_lora(model, rank=config.r, alpha=config.lora_alpha, target_modules=[])
    set_peft_model_state_dict(model.net, load_file(folder / "adapter_model.safetensors"))
    return model


def delta_of(config, weights):
    low, high = (next(w for name, w in weights.items() if f".lora_{part}." in name) for part in "AB")
    return {"delta": (high @ low * (config.lora_alpha / config.r)).detach().clone()}


def export_adapter(model, checkpoint, folder):
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = model.net.peft_config["default"], get_peft_model_state_dict(model.net)
    save_file(delta_of(config, weights), folder / "delta.safetensors")
    (folder / "toy_adapter.json").write_text(json.dumps({"base": checkpoint.name_or_path}))
    assert load_file(folder / "delta.safetensors")["delta"].shape == (DIM, DIM)


def merged_net(net, delta):
    net.hidden.weight.data += delta
    return net


def merge_adapter(adapter, checkpoint, folder):
    config = peft.PeftConfig.from_pretrained(adapter)
    delta = delta_of(config, load_file(adapter / "adapter_model.safetensors"))["delta"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(merged_net(load_net(checkpoint), delta).state_dict(), folder / "toy.safetensors")


@torch.no_grad()
def verify_export(folder, adapter, checkpoint, *, device, dtype=torch.float32):
    codes = torch.randint(32, (1, 3, 8), generator=torch.Generator().manual_seed(0))
    if (folder / "delta.safetensors").is_file():
        net = merged_net(load_net(checkpoint), load_file(folder / "delta.safetensors")["delta"])
    else:
        net = load_net(find_checkpoint(folder))
    trained = load_adapter(ToyLM(load_net(checkpoint)), adapter).eval().net
    difference = (net(codes)[0] - trained(codes)[0]).abs().max().item()
    assert difference < 1e-5, difference
    return difference


def split_adapter(checkpoint, name):
    adapter = RuntimeAdapter(name, checkpoint.lora_weights, DIM, 1.0) if checkpoint.lora_weights else None
    return ToyCheckpoint(checkpoint.name_or_path), adapter


class ToyEngine:
    """The codec has no decoder, so a frame is a constant at the level of its code."""

    padding_ids = frozenset({0})

    def __init__(self, net, deltas, num_slots, temperature):
        self.net, self.deltas, self.num_slots, self.temperature = net, deltas, num_slots, temperature or 1.0
        self.base = net.hidden.weight.detach().clone()
        self.strengths = np.zeros((num_slots, len(deltas)))
        for slot in range(num_slots):
            self.reset(slot)

    def reset(self, slot, *, seed=None):
        if not hasattr(self, "slots"):
            self.slots = {}
        self.slots[slot] = [None, torch.full((1, 3, 1), NO_TOKEN), deque(), torch.Generator().manual_seed(seed or 0)]

    def warm_up(self):
        pass

    def force_text(self, slot, tokens):
        self.slots[slot][2] = deque(tokens)

    def set_strength(self, slot, adapter, strength):
        self.strengths[slot, adapter] = strength

    @torch.no_grad()
    def step(self, frames):
        return {slot: self.step_slot(slot, user) for slot, user in frames.items()}

    def step_slot(self, slot, user):
        state, before, forced, generator = self.slots[slot]
        pairs = zip(self.strengths[slot], self.deltas, strict=True)
        self.net.hidden.weight.data = self.base + sum(strength * delta for strength, delta in pairs)
        logits, state = self.net(before, state)
        probabilities = [(x[0, 0] / self.temperature).softmax(-1) for x in logits.split([64, 32], dim=-1)]
        text, code = (int(torch.multinomial(p, 1, generator=generator)) for p in probabilities)
        is_forced = bool(forced)
        text = forced.popleft() if forced else text
        heard = int(ToyCodec().encode([np.stack([user, user])])[0][0, 0, 0])
        self.slots[slot][:2] = state, torch.tensor([[[text], [code], [heard]]])
        return Frame(text, np.full(SAMPLES_PER_FRAME, code / 32, np.float32), np.array([code]), is_forced)

    def close(self):
        pass


def open_engine(
    checkpoint, adapters=(), *, num_slots=1, device="cpu", dtype=None, temperature=None, text_temperature=None
):
    deltas = [load_file(adapter.weights)["delta"] for adapter in adapters]
    return ToyEngine(load_net(checkpoint), deltas, num_slots, temperature)


TOY = Family(
    name="toy",
    stream_names=("text", "audio"),
    find_checkpoint=find_checkpoint,
    load_lm=load_lm,
    load_codec=lambda checkpoint, device="cpu": ToyCodec(),
    load_tokenizer=lambda checkpoint: ToyTokenizer(),
    codec_sha256=lambda checkpoint: "toy",
    lay_out=lay_out,
    stream_masks=stream_masks,
    stream_weights=lambda config: (config.text_weight, config.first_codebook_weight),
    add_lora=add_lora,
    load_adapter=load_adapter,
    save_adapter=save_adapter,
    adapter_parameters=lambda model: [weight for weight in model.parameters() if weight.requires_grad],
    adapter_disabled=lambda model: model.net.disable_adapter(),
    export_adapter=export_adapter,
    verify_export=verify_export,
    merge_adapter=merge_adapter,
    split_adapter=split_adapter,
    is_same_base=lambda one, other: one.name_or_path == other.name_or_path,
    open_engine=open_engine,
    write_tiny_checkpoint=write_tiny_checkpoint,
)
