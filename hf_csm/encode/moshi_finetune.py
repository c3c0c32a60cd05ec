"""Conversations for moshi-finetune: 24 kHz stereo WAV, word alignments as JSON, and a JSONL manifest of each split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import soundfile
import yaml
from tqdm import tqdm

from hf_csm.data.audio import to_int16
from hf_csm.data.schema import SPLITS
from hf_csm.data.table import CARD_KEY, CARD_NAME
from hf_csm.encode.compose import MOSHI, Composition, Conversation
from hf_csm.encode.prepared_corpus import Clips, EncodeReport, PreparedCorpus, count_cells
from hf_csm.encode.staging import Staging, Unit
from hf_csm.units import SAMPLE_RATE, samples_to_seconds


SPEAKERS = {True: "SPEAKER_MAIN", False: "SPEAKER_USER"}
"""By whether the word is Moshi's."""
MANIFEST_VERSION = 2
"""Part of the fingerprint: raise it when the same input gives other files."""


def export_manifest(
    prepared: Path,
    out: Path,
    *,
    composition: Composition | None = None,
    variants: int = 1,
    label: str = "acted",
    progress: bool = True,
) -> EncodeReport:
    """Write the conversations that `encode` would make as `<split>/<id>.{wav,json}` and `<split>.jsonl`.

    Everything is written beside `out`, which is there when it is whole; a run that was stopped goes on after its last
    conversation. Moshi is on the left. Samples are rounded to 16 bits.

    Args:
        prepared: folder that `prepare` wrote.
        composition: as for `encode`.
        variants: as for `encode`.
        label: as for `encode`.

    Raises:
        UserError: `prepared` is no prepared corpus, has no such labels or gives no conversation, or `out` holds
            something else.
    """
    composition = composition or Composition()
    corpus = PreparedCorpus(prepared)
    units, dropped = corpus.plan(composition, variants, label)
    facts = {
        "stage": "manifest",
        "version": MANIFEST_VERSION,
        **{key: corpus.card[key] for key in ("corpus", "builder", "title", "license", "notice")},
        "composition": json.loads(json.dumps(dataclasses.asdict(composition))),
        "variants": variants,
        "label": label,
        "prepared_fingerprint": corpus.card["fingerprint"],
    }
    facts["fingerprint"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    report = EncodeReport(count_cells(units), dropped)
    staging = Staging(out, facts["fingerprint"])
    if staging.is_published():
        return replace(report, is_new=False)
    folder = staging.folder / "files"
    with tqdm(total=round(sum(u.duration_s for u in units)), unit="s", desc="export", disable=not progress) as bar:
        for unit in units:
            (folder / unit.split).mkdir(parents=True, exist_ok=True)
            missing = [c for c in unit.conversations if not (folder / _path(facts, unit, c, ".json")).exists()]
            clips = corpus.read(missing, composition)
            for conversation in missing:
                _write(folder / _path(facts, unit, conversation, ".wav"), conversation, clips)
            bar.update(round(unit.duration_s))
    for split in {unit.split for unit in units}:
        lines = [
            {
                "path": _path(facts, unit, conversation, ".wav"),
                "duration": samples_to_seconds(conversation.num_samples),
                "emotion": conversation.emotion,
                "language": conversation.language,
            }
            for unit in units
            if unit.split == split
            for conversation in unit.conversations
        ]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / CARD_NAME).write_text(_card(facts, report), encoding="utf-8")
    staging.put_in_place(folder)
    return report


def _path(facts: dict, unit: Unit, conversation: Conversation, suffix: str) -> str:
    """Return the place of a conversation in the folder; ids may have characters that a file name may not."""
    id_ = f"{facts['corpus']}-{conversation.id}"
    return f"{unit.split}/{quote(id_, safe='')}{suffix}"


def _write(path: Path, conversation: Conversation, clips: Clips) -> None:
    """Write the two files of a conversation, each whole or not at all; the alignments come last."""
    part = path.with_suffix(".tmp")
    samples = to_int16(clips.waveform(conversation).T)
    soundfile.write(str(part), samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    os.replace(part, path)
    # As float32, which is what a table of codes has: a word begins in the same frame there and here.
    alignments = [
        [
            word["word"],
            [float(np.float32(word[key])) for key in ("start_s", "end_s")],
            SPEAKERS[word["channel"] == MOSHI],
        ]
        for word in clips.words(conversation)
    ]
    part.write_text(json.dumps({"alignments": alignments}))
    os.replace(part, path.with_suffix(".json"))


def _card(facts: dict, report: EncodeReport) -> str:
    front = yaml.safe_dump(
        {"license": facts["license"], CARD_KEY: facts}, sort_keys=False, allow_unicode=True, width=1_000
    )
    manifests = ", ".join(f"`{split}.jsonl`" for split in SPLITS if any(cell[0] == split for cell in report.cells))
    return (
        f"---\n{front}---\n\n# {facts['title']}: conversations\n\n"
        f"Stereo recordings with Moshi on the left and the user on the right, their word times, and the manifests\n"
        f"{manifests}, as moshi-finetune reads them.\n\n```\n{report.render()}\n```\n\n"
        f"## Terms of the corpus\n\n{facts['notice']}\n"
    )
