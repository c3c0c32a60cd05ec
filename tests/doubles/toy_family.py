"""A model family that is not Moshi: each frame's text and code from the frame before, with one codebook each way.

It shows what the record in `hf_csm.models.family` asks of a family: nothing but these functions.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_csm.hub import fetch_file, find_model, split_url
from hf_csm.models.family import NO_TOKEN, Family, Frame, Layout, RuntimeAdapter, SpeechLM, TokenNLL, Window
from hf_csm.units import SAMPLES_PER_FRAME, frame_at, frames_to_seconds


LAYOUT = Layout((0, 0, 0), 1, 1, text_padding_id=0, end_of_text_padding_id=0, text_card=64, card=32)
DIM = 16


class ToyNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.ModuleList([torch.nn.Embedding(card + 1, DIM) for card in (64, 32, 32)])
        self.hidden, self.heads = torch.nn.Linear(DIM, DIM), torch.nn.Linear(DIM, 64 + 32)

    def forward(self, codes):
        x = sum(embed(stream + 1) for embed, stream in zip(self.embed, codes.unbind(1), strict=True))
        return self.heads(x + self.hidden(x)).split([64, 32], dim=-1)


class ToyLM(SpeechLM):
    def __init__(self, net):
        super().__init__()
        self.net, self.layout = net, LAYOUT

    def forward(self, codes):
        logits = self.net(torch.nn.functional.pad(codes, (1, -1), value=NO_TOKEN))
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
    revision: str | None
    weights: Path
    lora_weights: Path | None = None
    is_local: bool = True


class ToyCodec:
    """The code of a frame is its loudness."""

    num_codebooks, device = 1, torch.device("cpu")

    def encode(self, waveforms):
        frames = [waveform.reshape(2, 1, -1, SAMPLES_PER_FRAME).std(axis=-1) for waveform in waveforms]
        return [np.clip(loudness * 320, 0, 31).astype(np.int16) for loudness in frames]


class ToyTokenizer:
    """A token is the first letter of a word."""

    def encode(self, text):
        return [1 + ord(word[0]) % 63 for word in text.split()]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def write_toy(folder, seed=0):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "weights": "toy.safetensors"}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(ToyNet().state_dict(), folder / "toy.safetensors")
    return folder


def base_urls(name, revision=None):
    return f"file://{find_model(name)}/toy.safetensors", []


def find_checkpoint(name, revision=None):
    folder = find_model(name, revision, files=["delta.safetensors"])
    folder = folder / "consolidated" if (folder / "consolidated").is_dir() else folder
    weights = json.loads((folder / "config.json").read_text())["weights"]
    if "://" not in weights and not Path(name).is_dir():
        weights = f"hf://{name}/{weights}"
    path = fetch_file(*split_url(weights)) if weights.startswith("hf://") else folder / weights.removeprefix("file://")
    delta = folder / "delta.safetensors"
    return ToyCheckpoint(str(name), revision, path, delta if delta.is_file() else None)


def load_net(checkpoint):
    net = ToyNet()
    net.load_state_dict(load_file(checkpoint.weights))
    return net


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
    masks[0, :, 0] = (codes[:, 0] != NO_TOKEN) & (torch.arange(codes.shape[2]) >= num_given[:, None])
    masks[1, :, 1] = codes[:, 1] != NO_TOKEN
    return masks


def load_lm(checkpoint, *, device, dtype, gradient_checkpointing=False):
    net = load_net(checkpoint).to(device, dtype)
    net.name_or_path = checkpoint.name_or_path  # as PEFT reads it
    return ToyLM(net)


def add_lora(model, *, rank, alpha, target_modules, dropout=0.0, seed=0):
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["hidden"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.net = peft.get_peft_model(model.net, config)
    return model


def load_adapter(model, folder):
    if not isinstance(model.net, peft.PeftModel):
        config = peft.PeftConfig.from_pretrained(folder)
        add_lora(model, rank=config.r, alpha=config.lora_alpha, target_modules=[])
    set_peft_model_state_dict(model.net, load_file(folder / "adapter_model.safetensors"))
    return model


def delta_of(adapter):
    if isinstance(adapter, ToyLM):
        config, weights = adapter.net.peft_config["default"], get_peft_model_state_dict(adapter.net)
    else:
        config, weights = peft.PeftConfig.from_pretrained(adapter), load_file(adapter / "adapter_model.safetensors")
    low, high = (next(weight for name, weight in weights.items() if f".lora_{part}." in name) for part in "AB")
    return (high @ low * (config.lora_alpha / config.r)).detach().clone()


def export_adapter(adapter, checkpoint, folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"delta": delta_of(adapter)}, folder / "delta.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "weights": f"file://{checkpoint.weights}"}))


def merge_adapter(adapter, checkpoint, folder):
    weights = load_file(checkpoint.weights)
    weights["hidden.weight"] += delta_of(adapter)
    save_file(weights, folder / "toy.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "weights": "toy.safetensors"}))


@torch.no_grad()
def verify_export(folder, adapter, checkpoint, *, device, dtype=torch.float32):
    codes = torch.randint(32, (1, 3, 8), generator=torch.Generator().manual_seed(0))
    found = find_checkpoint(folder)
    engine = open_engine(found, [split_adapter(found, "")[1]] if found.lora_weights else [])
    engine.set_strength(0, 0, 1.0)
    trained = load_adapter(load_lm(checkpoint, device=device, dtype=torch.float32), adapter).eval()
    difference = (engine.net_of(0)(codes)[0] - trained.net(codes)[0]).abs().max().item()
    assert difference < 1e-5, difference
    return difference


def split_adapter(checkpoint, name):
    base = ToyCheckpoint(str(checkpoint.weights.parent), None, checkpoint.weights)
    return base, RuntimeAdapter(name, checkpoint.lora_weights, DIM, 1.0) if checkpoint.lora_weights else None


class ToyEngine:
    """The codec has no decoder, so a frame is a constant at the level of its code."""

    padding_ids = frozenset({0})

    def __init__(self, net, deltas, num_slots):
        self.net, self.deltas, self.num_slots = net, deltas, num_slots
        self.base, self.slots = net.hidden.weight.detach().clone(), {}
        self.strengths = np.zeros((num_slots, len(deltas)))

    def reset(self, slot, *, seed=None):
        generator = torch.Generator().manual_seed(seed or 0)
        self.slots[slot] = [torch.full((1, 3, 1), NO_TOKEN), generator, []]

    def force_text(self, slot, tokens):
        self.slots[slot][2] = list(tokens)

    def force_words(self, slot, words):
        self.slots[slot][2] += ToyTokenizer().encode(" ".join(words))
        self.last = len(self.slots[slot][2]) - 1

    def last_word_frame(self, slot):
        return None if self.slots[slot][2] else self.last

    def words_in(self, tokens):
        return [{"word": str(t), "start_s": frames_to_seconds(n)} for n, t in enumerate(tokens) if t]

    def set_strength(self, slot, adapter, strength):
        self.strengths[slot, adapter : adapter + 1] = strength

    def net_of(self, slot):
        pairs = zip(self.strengths[slot], self.deltas, strict=True)
        self.net.hidden.weight.data = self.base + sum(strength * delta for strength, delta in pairs)
        return self.net

    @torch.no_grad()
    def step(self, frames):
        return {slot: self.step_slot(slot, user) for slot, user in frames.items()}

    def step_slot(self, slot, user):
        before, generator, forced = self.slots[slot]
        probabilities = [logits[0, 0].softmax(-1) for logits in self.net_of(slot)(before)]
        text, code = (int(torch.multinomial(p, 1, generator=generator)) for p in probabilities)
        text = forced.pop(0) if forced else text
        user_code = int(ToyCodec().encode([np.stack([user, user])])[0][0, 0, 0])
        self.slots[slot][0] = torch.tensor([[[text], [code], [user_code]]])
        return Frame(text, np.full(SAMPLES_PER_FRAME, code / 32, np.float32), np.array([code]))

    def close(self):
        pass


def open_engine(checkpoint, adapters=(), *, num_slots=1, device="cpu", dtype=None, **sampling):
    return ToyEngine(load_net(checkpoint), [load_file(adapter.weights)["delta"] for adapter in adapters], num_slots)


TOY = Family(
    name="toy",
    stream_names=("text", "audio"),
    find_checkpoint=find_checkpoint,
    load_lm=load_lm,
    load_codec=lambda checkpoint, device="cpu": ToyCodec(),
    load_tokenizer=lambda checkpoint: ToyTokenizer(),
    codec_sha256=lambda checkpoint: "toy",
    base_urls=base_urls,
    lay_out=lay_out,
    stream_masks=stream_masks,
    stream_weights=lambda config: (config.text_weight, config.first_codebook_weight),
    add_lora=add_lora,
    load_adapter=load_adapter,
    save_adapter=lambda model, folder: model.net.save_pretrained(folder),
    adapter_parameters=lambda model: [weight for weight in model.parameters() if weight.requires_grad],
    adapter_disabled=lambda model: model.net.disable_adapter(),
    adapter_files=("delta.safetensors", "config.json"),
    merged_files=("toy.safetensors", "config.json"),
    export_adapter=export_adapter,
    merge_adapter=merge_adapter,
    verify_export=verify_export,
    split_adapter=split_adapter,
    is_same_base=lambda one, other: one.weights == other.weights,
    open_engine=open_engine,
)
