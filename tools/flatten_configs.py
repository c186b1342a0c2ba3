"""Write mmseg_resnest/configs/ from configs/: one flat file a leaf, for pure-Python inheritance.

python tools/flatten_configs.py
"""

import ast
from pathlib import Path

from mmengine.config import Config

import mmseg_resnest

PACKAGE = Path(mmseg_resnest.__file__).parent
LEAVES = PACKAGE / '.mim' / 'configs' / 'resnest'


def flatten(leaf: Path) -> str:
    """Returns the text of a leaf with all that it inherits written out, in plain assignments."""
    docstring = ast.get_docstring(ast.parse(leaf.read_text()), clean=False)
    note = f'Generated from configs/{leaf.name} by `make configs`; edit that file.'
    return f'"""{docstring}\n{note}\n"""\n\n{Config.fromfile(leaf).pretty_text}'


def main() -> None:
    """Writes every leaf's flat file and removes those whose leaf is gone."""
    target = PACKAGE / 'configs'
    leaves = sorted(LEAVES.glob('*.py'))
    for stale in {p.name for p in target.glob('*.py')} - {p.name for p in leaves} - {'__init__.py'}:
        (target / stale).unlink()
    for leaf in leaves:
        (target / leaf.name).write_text(flatten(leaf))
    print(f'Wrote {len(leaves)} files to {target}')


if __name__ == '__main__':
    main()
