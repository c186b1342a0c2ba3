"""A measurement in a process of its own."""

import ast
import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

_RESULT = 'RESULT '


def run_alone(module: str, spec: Any) -> dict:
    """Runs ``python -m MODULE SPEC`` and returns what it gave to ``hand_over``.

    Args:
        module: The module.
        spec: A dataclass of plain values, with the attribute ``side``.

    Raises:
        RuntimeError: It failed; the message has its exit code and the ends of what it printed.
    """
    # A crash of compiled code, which says nothing by itself, prints the Python stack.
    command = [sys.executable, '-X', 'faulthandler', '-m', module, repr(asdict(spec))]
    done = subprocess.run(command, capture_output=True, text=True)
    results = [text for text in done.stdout.splitlines() if text.startswith(_RESULT)]
    if done.returncode or not results:
        printed = f'{_end(done.stdout)}\n{_end(done.stderr)}'
        raise RuntimeError(f'{spec.side}: ended with {done.returncode}, {len(results)} results: {printed}')
    return json.loads(results[-1].removeprefix(_RESULT))


def _end(text: str) -> str:
    # A crash ends with the names of all compiled modules, which would leave no room for where it happened.
    lines = [line for line in text.strip().splitlines() if not line.startswith('Extension modules: ')]
    return '\n'.join(lines)[-4000:]


def fields() -> dict[str, Any]:
    """Returns the fields of the spec that ``run_alone`` has started this process with."""
    return ast.literal_eval(sys.argv[1])  # JSON would make lists of tuples


def hand_over(result: dict) -> None:
    """Gives the result to the process that waits for it."""
    print('\n' + _RESULT + json.dumps(result))  # a line of its own, whatever a library has left unfinished
