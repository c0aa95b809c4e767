"""docs/python.md: its blocks run, one after the other, as a reader would type them."""

import re
import sys
from pathlib import Path

from commands import environment, run

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


def test_blocks_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.M | re.S)
    assert len(blocks) > 10
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), "utf-8")
    done = run([sys.executable, script], cwd=tmp_path, env=environment(RWKV_HOME=str(tmp_path)))
    assert (done.returncode, done.stderr) == (0, "")
    assert "'no such model' is no model" in done.stdout
