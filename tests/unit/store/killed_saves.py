"""Run as a program: saves that are killed, one after the other, each at its own action on the file system.

`killed_saves.py FOLDER NUM STRIDE`: for each STRIDE-th n below NUM, copy FOLDER/seed to FOLDER/n and save there in
a child that SIGKILLs itself before its n-th opening, linking, renaming, removing or making of a file. Prints one
line per child: n, and `killed` or `ended`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

ACTIONS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def kill_before_action(number: int, root: str) -> None:
    remaining = number

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal remaining
        if event in ACTIONS and str(arguments[0]).startswith(root):
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining -= 1

    sys.addaudithook(watch)


def save_in_child(store_dir: Path, number: int) -> str:
    from versions_made import save

    from eagleray.store.objects import ObjectStore

    child = os.fork()
    if child == 0:
        store = ObjectStore.open(str(store_dir))
        kill_before_action(number, str(store_dir))
        result = save(store, 2, bleu=2.0)
        os._exit(0 if result.ref else 3)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    return "ended" if status == 0 else f"status {status}"


def main(folder: Path, num: int, stride: int) -> None:
    for number in range(0, num, stride):
        shutil.copytree(folder / "seed", folder / str(number))
        print(number, save_in_child(folder / str(number), number), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
