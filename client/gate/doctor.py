"""The checks of a site's gate: its policy, its sandbox, its data and its GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from corymb.client.gate.policy import Refusal, SitePolicy
from corymb.client.gate.program import POLICY
from corymb.client.gate.sandbox import sandboxed
from corymb.protocol.findings import Fault, Finding, good

CODE = "import torch; print(torch.cuda.is_available())"


def gate_findings(folder: Path) -> Iterator[Finding]:
    """Yield what is found in the gate of the site whose kit lies in `folder`."""
    try:
        policy = SitePolicy.read(folder / POLICY)
    except Refusal as refusal:
        yield Finding(Fault.POLICY, f"{refusal}; correct {folder / POLICY}.")
        return
    current = [approval for approval in policy.approved if approval.expires > date.today()]
    if policy.pause:
        yield Finding(Fault.POLICY, f"The site has paused: pause = true in {folder / POLICY}.")
    elif not current:
        yield Finding(Fault.POLICY, "No app is approved at this site; see `corymb approve --help`.")
    else:
        yield good(f"{len(current)} approved: {', '.join(approval.purpose for approval in current)}.")
    for path in policy.data:
        yield _data(path)
    if policy.sandbox and all(path.exists() for path in policy.data):
        yield _sandbox(folder, policy)
    yield from _gpu(folder, policy)


def _data(path: Path) -> Finding:
    try:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files[:1000]:
            with file.open("rb"):
                pass
    except OSError as error:
        return Finding(Fault.DATA, f"The data {error.filename} cannot be read by this user: {error.strerror}.")
    if not files:
        return Finding(Fault.DATA, f"There are no data at {path}; correct data in {POLICY}.")
    return good(f"Data: {path}, {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB.")


def _sandbox(folder: Path, policy: SitePolicy) -> Finding:
    try:
        done = subprocess.run(sandboxed(["true"], policy.data, folder), capture_output=True, text=True, timeout=30)
    except Refusal as refusal:
        return Finding(Fault.SANDBOX, f"{str(refusal)[0].upper()}{str(refusal)[1:]}.")
    if done.returncode:
        said = " ".join(done.stderr.split())
        return Finding(Fault.SANDBOX, f"bubblewrap makes no sandbox ({said}); allow user namespaces.")
    return good("Apps run in a sandbox.")


def _gpu(folder: Path, policy: SitePolicy) -> Iterator[Finding]:
    if not shutil.which("nvidia-smi"):
        yield good("There is no NVIDIA GPU; apps train on the CPU.")
        return
    command = [sys.executable, "-c", CODE]
    command = sandboxed(command, policy.data, folder) if policy.sandbox else command
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.stdout.strip() == "True":
        yield good("torch can use the GPU.")
    else:
        yield Finding(
            Fault.GPU, "There is an NVIDIA GPU that torch cannot use; install torch with CUDA for its driver."
        )
