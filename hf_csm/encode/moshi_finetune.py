"""Export conversations for moshi-finetune: 24 kHz stereo WAV, word alignments as JSON, a JSONL manifest per split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import soundfile
from tqdm import tqdm

from hf_csm.data.audio import to_int16
from hf_csm.data.schema import SPLITS
from hf_csm.data.staged_table import StagedTable, fingerprint_of
from hf_csm.data.table import CARD_KEY, CARD_NAME, card_text
from hf_csm.encode.compose import MODEL, Composition, Conversation, Unit
from hf_csm.encode.prepared_corpus import Clips, PreparedCorpus
from hf_csm.encode.report import EncodeReport, count_groups
from hf_csm.files import replaced_file, write_text_atomic
from hf_csm.units import SAMPLE_RATE, samples_to_seconds


SPEAKERS = {True: "SPEAKER_MAIN", False: "SPEAKER_USER"}
"""moshi-finetune's speaker names, by whether the word is Moshi's."""
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
    """Write the conversations that `encode` would compose as `<split>/<id>.{wav,json}` and `<split>.jsonl`.

    The folder is staged beside `out` and published at once; a run that was stopped continues after its last
    conversation. Moshi is on the left. Samples are rounded to 16 bits. Arguments are as for `encode`.

    Raises:
        UserError: `prepared` is not a prepared corpus, lacks the labels or yields no conversation, or `out` holds
            something else or is being written by another run.
    """
    composition = composition or Composition()
    corpus = PreparedCorpus(prepared)
    units, dropped = corpus.plan(composition, variants, label)
    facts = {"stage": "manifest", "version": MANIFEST_VERSION, **corpus.facts(composition, variants, label)}
    facts = json.loads(json.dumps(facts))  # tuples become lists
    facts["fingerprint"] = fingerprint_of(facts)
    report = EncodeReport(count_groups(units), dropped)
    staged = StagedTable(out, facts["fingerprint"])
    if staged.is_published():
        return replace(report, is_new=False)
    with staged.lock():
        if staged.is_published():  # by a run that ended just now
            staged.remove()
            return replace(report, is_new=False)
        folder = staged.table(facts["fingerprint"][:12])
        with tqdm(total=round(sum(u.duration_s for u in units)), unit="s", desc="export", disable=not progress) as bar:
            for unit in units:
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
            write_text_atomic(folder / f"{split}.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        write_text_atomic(folder / CARD_NAME, _card(facts, report))
        staged.publish(folder)
    return report


def _path(facts: dict, unit: Unit, conversation: Conversation, suffix: str) -> str:
    """Return the path of a conversation in the folder; characters that file names cannot have are quoted."""
    id_ = f"{facts['corpus']}-{conversation.id}"
    return f"{unit.split}/{quote(id_, safe='')}{suffix}"


def _write(path: Path, conversation: Conversation, clips: Clips) -> None:
    """Write the audio and then the alignments of a conversation, each atomically."""
    samples = to_int16(clips.waveform(conversation).T)
    with replaced_file(path) as temporary:
        soundfile.write(str(temporary), samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    # Rounded to float32 as in a table of codes, so that a word begins in the same frame in both.
    alignments = [
        [
            word["word"],
            [float(np.float32(word[key])) for key in ("start_s", "end_s")],
            SPEAKERS[word["channel"] == MODEL],
        ]
        for word in clips.words(conversation)
    ]
    write_text_atomic(path.with_suffix(".json"), json.dumps({"alignments": alignments}))


def _card(facts: dict, report: EncodeReport) -> str:
    manifests = ", ".join(f"`{split}.jsonl`" for split in SPLITS if any(group[0] == split for group in report.groups))
    body = (
        f"Stereo recordings with Moshi on the left and the user on the right, their word times, and the manifests\n"
        f"{manifests}, as moshi-finetune reads them.\n\n```\n{report.render()}\n```\n\n"
        f"## Terms of the corpus\n\n{facts['notice']}\n"
    )
    front = {"license": facts["license"], CARD_KEY: facts}
    return card_text(front, f"{facts['title']}: conversations", body)
