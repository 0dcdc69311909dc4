"""Agent and shim start without the modules they do not need, and get the real ones when they need them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
UNWANTED = (
    "ssl", "inspect", "ast", "dis", "logging", "traceback", "subprocess", "concurrent.futures._base",
    "dataclasses", "typing", "tempfile", "shutil", "pathlib", "argparse", "random", "hashlib", "google",
)  # fmt: skip


def python(code: str) -> str:
    """What a fresh interpreter, started as the guest's is, says to code."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_agent_loads_nothing_it_does_not_need() -> None:
    loaded = python(
        "import agent.__main__\nfrom rpc.lean import Deferred\n"
        "print(*(name for name, module in sys.modules.items() if not isinstance(module, Deferred)))"
    ).split()
    # Before 3.12 asyncio.staggered takes names from typing that no stand-in should have to know.
    unwanted = [name for name in UNWANTED if sys.version_info >= (3, 12) or name != "typing"]
    assert [name for name in unwanted if name in loaded] == []
    assert "agent.services" in loaded


def test_stand_ins_give_what_the_real_modules_give() -> None:
    assert (
        python(
            "import subprocess, concurrent.futures, logging\n"
            "from rpc import lean\n"
            "assert all(getattr(subprocess, name) == value for name, value in lean.SUBPROCESS.items())\n"
            "assert all(getattr(concurrent.futures, name) == value for name, value in lean.FUTURES.items())\n"
            "print(logging.DEBUG == lean.DEBUG)"
        )
        == "True\n"
    )


def test_a_shim_loads_nothing_of_asyncio_s_that_it_does_not_need() -> None:
    loaded = python(
        "import shim.daemon\nfrom rpc.lean import Deferred, for_shim\nfor_shim()\nimport shim.main\n"
        "print(*(name for name, module in sys.modules.items() if not isinstance(module, Deferred)))"
    ).split()
    assert [name for name in ("ssl", "asyncio.sslproto", "subprocess", "hashlib") if name in loaded] == []
    assert "shim.services.task" in loaded


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("import traceback; print(traceback.format_exc.__name__)", "format_exc"),
        ("import inspect; print(inspect.iscoroutinefunction(main))", "True"),
        ("from typing import NamedTuple; print(NamedTuple.__name__)", "NamedTuple"),
        ("import subprocess; print(subprocess.run(['true']).returncode)", "0"),
        ("import concurrent.futures; print(concurrent.futures.ThreadPoolExecutor.__name__)", "ThreadPool"),
        ("import logging; logging.getLogger('x').warning('heard'); print(logging.INFO)", "20"),
        ("import ssl; print(ssl.__name__)", "ssl"),
        ("print(asyncio.iscoroutinefunction(main))", "True"),
        ("async def n(): return await asyncio.to_thread(len, 'abc')\nprint(asyncio.run(n()))", "3"),
        ("print(asyncio.FIRST_COMPLETED)", "FIRST_COMPLETED"),
    ],
)
def test_who_asks_for_more_gets_the_real_module(use: str, said: str) -> None:
    lean = "from rpc import lean; lean.for_agent(); import asyncio"
    out = python(f"{lean}\nasync def main(): pass\nasyncio.run(main())\n{use}")
    assert out.startswith(said)


def test_failed_task_is_reported_as_ever() -> None:
    code = (
        "from rpc import lean; lean.for_agent(); import asyncio\n"
        "async def fail(): raise ValueError('seen')\n"
        "async def main():\n"
        "    task = asyncio.create_task(fail()); await asyncio.wait([task]); del task\n"
        "    import gc; gc.collect()\n"
        "asyncio.run(main())"
    )
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True, check=True)
    assert "Task exception was never retrieved" in done.stderr
    assert "ValueError: seen" in done.stderr
