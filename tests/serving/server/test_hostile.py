import asyncio
import json
import os
import urllib.request

import numpy as np
import psutil
import pytest

from hf_csm.units import SAMPLES_PER_FRAME
from tests.doubles.hostile import abort, pester
from tests.doubles.server import ServerProcess, converse
from tests.doubles.waiting import GUARD_S, wait_until


def ask(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=GUARD_S) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_server_survives_ten_thousand_bad_messages_and_a_thousand_aborted_connections(tiny_moshi, tmp_path):
    speech = (0.1 * np.random.default_rng(0).normal(size=40 * SAMPLES_PER_FRAME)).astype(np.float32)

    async def storm(num_messages, num_connections, seed):
        """Two hostile clients beside one normal conversation, then eight that abort their connections."""
        normal = asyncio.create_task(converse(server.port, speech, pace_s=0.08))
        bad = await asyncio.gather(*(pester(server.port, num_messages // 2, 10 * seed + n) for n in range(2)))
        heard = await normal
        left = await abort(server.port, num_connections, seed)
        assert len(heard.audio) >= 34 * SAMPLES_PER_FRAME and heard.close_code is None
        return bad[0] + bad[1], left

    # Memory is measured after a first storm has filled the caches of the allocators.
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
        wait_until(lambda: ask(server.port, "/api/info")["free_slots"] == 6)
        assert ask(server.port, "/health") == {"status": "ok"}

        async def all_slots():
            return await asyncio.gather(*(converse(server.port, speech) for _ in range(6)))

        for heard in asyncio.run(all_slots()):
            assert heard.handshake == b"\x00" and len(heard.audio) >= 34 * SAMPLES_PER_FRAME
        assert server.process.poll() is None
    assert "Traceback" not in (tmp_path / "log").read_text()
