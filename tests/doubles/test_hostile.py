import asyncio
import itertools
import json
import os
import urllib.request

import numpy as np
import psutil
import pytest
import sphn

from hf_csm.units import SAMPLE_RATE, SAMPLES_PER_FRAME
from tests.doubles.hostile import abort, bad_messages, opus_stream, pester
from tests.doubles.server import ServerProcess, converse


def test_the_same_seed_breaks_the_same_rules():
    one, again, other = ([*itertools.islice(bad_messages(seed), 60)] for seed in (1, 1, 2))
    assert one == again != other


def test_the_stream_that_is_broken_was_whole():
    reader = sphn.OpusStreamReader(SAMPLE_RATE)
    assert sum(reader.append_bytes(message).size for message in opus_stream(4)) == 4 * SAMPLES_PER_FRAME


def ask(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_our_server_stands_ten_thousand_bad_messages_and_a_thousand_aborted_connections(tiny_moshi, tmp_path):
    speech = (0.1 * np.random.default_rng(0).normal(size=40 * SAMPLES_PER_FRAME)).astype(np.float32)

    async def storm(num_messages, num_connections, seed):
        """Two who pester and eight who leave, while a third talks as he should."""
        normal = asyncio.create_task(converse(server.port, speech, pace_s=0.08, timeout_s=10))
        await asyncio.sleep(0.5)
        bad, left = asyncio.gather(*(pester(server.port, num_messages // 2, 10 * seed + n) for n in range(2))), None
        bad = await bad
        heard = await normal
        left = await abort(server.port, num_connections, seed)
        assert len(heard.audio) >= 34 * SAMPLES_PER_FRAME and heard.close_code is None
        return bad[0] + bad[1], left

    # Memory is measured after as much of everything as makes allocators keep what they will.
    arguments = ["serve", str(tiny_moshi), "--device", "cpu", "--slots", "6"]
    environment = dict(os.environ, MALLOC_ARENA_MAX="2")
    with ServerProcess("hf_csm.cli", arguments, log=tmp_path / "log", environment=environment) as server:
        memory = psutil.Process(server.process.pid).memory_info
        asyncio.run(storm(3000, 200, seed=1))
        before = memory().rss
        bad, left = asyncio.run(storm(10_000, 1000, seed=2))
        after = memory().rss
        print(dict(bad), dict(left), f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")
        assert bad["messages"] >= 10_000 and sum(left.values()) == 1000
        assert not bad["not connected"]
        assert after <= 1.05 * before
        for _ in range(100):
            if ask(server.port, "/api/info")["free_slots"] == 6:
                break
            asyncio.run(asyncio.sleep(0.05))
        assert ask(server.port, "/health") == {"status": "ok"}
        assert ask(server.port, "/api/info")["free_slots"] == 6

        async def all_slots():
            return await asyncio.gather(*(converse(server.port, speech) for _ in range(6)))

        for heard in asyncio.run(all_slots()):
            assert heard.handshake == b"\x00" and len(heard.audio) >= 34 * SAMPLES_PER_FRAME
        assert server.process.poll() is None
    assert "Traceback" not in (tmp_path / "log").read_text()
