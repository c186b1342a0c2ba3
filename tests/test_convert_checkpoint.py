"""tools/convert_checkpoint.py: another project's file becomes one that our models load, but not in the wrong graph."""

import re

import pytest
import timm
import torch
from mmseg.models import ResNeSt as MMSegResNeSt
from tiny import Payload, run_tool

from mmseg_resnest import ResNeSt
from mmseg_resnest.checkpoints import ORIGIN, read_checkpoint


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    torch.save(timm.create_model('resnest14d').state_dict(), folder / 'timm.pth')
    theirs = MMSegResNeSt(depth=50, stem_channels=64, base_width=64, norm_cfg=dict(type='BN'))
    state = {f'module.{key}': value for key, value in theirs.state_dict().items()}
    torch.save(dict(state_dict=state, meta={}), folder / 'mmseg.pth')
    torch.save({'conv.weight': torch.zeros(1)}, folder / 'other.pth')
    torch.save(dict(state_dict=Payload(folder / 'made')), folder / 'evil.pth')
    return folder


def convert(folder, *args):
    return run_tool('convert_checkpoint', *args, cwd=folder)


def test_mmsegs_backbone_is_told_by_its_keys_and_kept_to_its_graph(folder):
    done = convert(folder, 'mmseg.pth', 'ours.pth')
    assert done.returncode == 0, done.stderr
    assert "mmsegmentation's or mmdetection's backbone (mmseg)" in done.stdout
    assert "  model.backbone.graph = 'mmseg'\n" in done.stdout
    content = read_checkpoint(folder / 'ours.pth')
    assert content['meta'][ORIGIN] == dict(source='mmseg', options={'backbone.graph': 'mmseg'})
    init_cfg = dict(type='Pretrained', checkpoint=str(folder / 'ours.pth'))
    ours = ResNeSt(50, output_stride=8, graph='mmseg', init_cfg=init_cfg)
    ours.init_weights()
    theirs = torch.load(folder / 'mmseg.pth')['state_dict']
    assert torch.equal(ours.conv1[6].weight, theirs['module.stem.6.weight'])
    with pytest.raises(ValueError, match=r"ours.pth needs model.backbone.graph='mmseg', found 'authors'"):
        ResNeSt(50, output_stride=8, init_cfg=init_cfg).init_weights()
    ResNeSt(50, output_stride=32, init_cfg=init_cfg).init_weights()  # where the graphs are one


def test_shared_keys_are_never_guessed(folder):
    done = convert(folder, 'timm.pth', 'ours.pth')
    assert done.returncode == 2
    for source in ('official', 'encoding', 'timm'):
        assert re.search(rf'^  --source {source} ', done.stderr, re.M)
    done = convert(folder, 'timm.pth', 'ours.pth', '--source', 'timm')
    assert done.returncode == 0, done.stderr
    assert 'dropped: fc.weight, fc.bias' in done.stdout
    assert read_checkpoint(folder / 'ours.pth')['meta'][ORIGIN]['options'] == {'backbone.graph': 'timm'}


@pytest.mark.parametrize(
    ('args', 'code', 'message'),
    [
        (('none.pth', 'x.pth'), 2, 'none.pth: there is no such checkpoint'),
        (('other.pth', 'x.pth'), 2, 'no known source has these keys (conv.weight, ...)'),
        (('other.pth', 'x.pth', '--source', 'mmseg'), 1, 'has no rule for 1 keys: conv.weight'),
        (('evil.pth', 'x.pth'), 1, 'not a checkpoint that can be loaded safely'),
    ],
)
def test_bad_input(folder, args, code, message):
    done = convert(folder, *args)
    assert (done.returncode, 'Traceback' in done.stderr) == (code, False)
    assert message in done.stderr
    assert not (folder / 'x.pth').exists()
    assert not (folder / 'made').exists()
