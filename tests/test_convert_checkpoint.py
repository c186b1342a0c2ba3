"""tools/convert_checkpoint.py: another project's file becomes one that our models load, but not in the wrong graph."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine import Config
from safetensors.torch import save_file
from tiny import ROOT, Payload, run_tool

from mmseg_resnest import ResNeSt
from mmseg_resnest.checkpoints import ORIGIN, check_options, load_strictly, read_checkpoint
from mmseg_resnest.cli import UsageError
from mmseg_resnest.key_maps import Clue, needed_options
from mmseg_resnest.registry import MODELS
from mmseg_resnest.variants import VARIANTS

CLASSES = ('sky', 'road', 'car')
PALETTE = [[0, 0, 0], [1, 2, 3], [250, 0, 9]]


def their_psp_model():
    """A PSPNet's weights under mmsegmentation's names, and under ours."""
    cfg = Config.fromfile(ROOT / 'configs' / '_base_' / 'pspnet.py').model
    cfg.backbone.update(depth=14, graph='mmseg')
    for head in (cfg.decode_head, cfg.auxiliary_head):
        head.update(channels=8, num_classes=len(CLASSES))
    ours = MODELS.build(cfg).state_dict()
    stem = re.compile(r'backbone\.(?:conv1\.(\d)|bn1)')
    return {stem.sub(lambda match: f'backbone.stem.{match[1] or 7}', key): value for key, value in ours.items()}, ours


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    weights = timm.create_model('resnest14d').state_dict()
    torch.save(weights, folder / 'unnamed.pth')
    save_file(weights, folder / 'resnest14d.gluon_in1k.safetensors')
    torch.save({'conv.weight': torch.zeros(1)}, folder / 'other.pth')
    torch.save(dict(state_dict=Payload(folder / 'made')), folder / 'evil.pth')
    return folder


def convert(folder, *args):
    return run_tool('convert_checkpoint', *args, cwd=folder)


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('convert_checkpoint', ROOT / 'tools' / 'convert_checkpoint.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_segmentation_model_of_mmseg(tmp_path):
    """What is printed is a model's config; its weights are those of the file; what is stored is compared."""
    theirs, ours = their_psp_model()
    content = dict(
        state_dict={f'module.{key}': value for key, value in theirs.items()},
        meta=dict(CLASSES=CLASSES, PALETTE=PALETTE, config='model = dict()', epoch=3),
        optimizer=dict(state={}, param_groups=[dict(lr=0.1)]),
    )
    torch.save(content, tmp_path / 'theirs.pth')
    done = convert(tmp_path, 'theirs.pth', 'new/ours.pth')
    assert done.returncode == 0, done.stderr
    lines, _, snippet = done.stdout.partition('\n\n')
    stem = [key for key in ours if re.match(r'backbone\.(conv1|bn1)\.', key)]
    assert lines.splitlines()[-9:] == [
        "theirs.pth: mmsegmentation's PSPNet (S-101-D8) (mmseg-pspnet), told by its keys",
        '  architecture: resnest14, told by its shapes',
        f'  stem: {len(stem)} tensors, {len(stem)} renamed, as backbone.stem.0.weight -> backbone.conv1.0.weight',
        '  shortcuts: 24 tensors, their names stay',
        f'  blocks: {sum(".layer" in key for key in ours) - 24} tensors, their names stay',
        f'  decode head: {sum("decode" in key for key in ours)} tensors, their names stay',
        f'  auxiliary head: {sum("auxiliary" in key for key in ours)} tensors, their names stay',
        '  dropped: none',
        f'new/ours.pth: {len(ours)} tensors. The model that they fit, for a config:',
    ]
    content = read_checkpoint(tmp_path / 'new' / 'ours.pth')
    assert content['meta'] == {
        ORIGIN: dict(
            source='mmseg-pspnet', variant='resnest14', options=needed_options('mmseg-pspnet', 'resnest14', ours)
        ),
        'dataset_meta': dict(classes=list(CLASSES), palette=PALETTE),
    }
    options = content['meta'][ORIGIN]['options']
    assert options['backbone.output_stride'] == 8
    assert options['decode_head.pool_scales'] == (1, 2, 3, 6)
    model = MODELS.build(Config.fromstring(snippet, '.py').model)
    load_strictly(model, content['state_dict'], 'ours.pth')
    check_options(content, model, 'ours.pth')
    assert all(torch.equal(model.state_dict()[key], value) for key, value in ours.items())
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['ours.pth']


def test_a_backbone_of_timm_by_its_file_name(folder):
    done = convert(folder, 'resnest14d.gluon_in1k.safetensors', 'timm.pth')
    assert done.returncode == 0, done.stderr
    assert "(timm), told by its name: timm's resnest14d\n  architecture: resnest14, told by its name" in done.stdout
    assert re.search(r'dropped: fc\.(weight|bias), fc\.(weight|bias)\n', done.stdout)
    backbone = Config.fromstring(done.stdout.partition('\n\n')[2], '.py').model.backbone
    assert backbone.init_cfg.checkpoint == 'timm.pth'
    backbone.init_cfg.checkpoint = str(folder / 'timm.pth')
    ours = MODELS.build(backbone | dict(output_stride=8))
    ours.init_weights()
    assert torch.equal(ours.conv1[6].weight, torch.load(folder / 'unnamed.pth')['conv1.6.weight'])
    wrong = ResNeSt(14, output_stride=8, init_cfg=backbone.init_cfg)
    with pytest.raises(
        ValueError, match=r"timm\.pth \(timm\) .*\n  model\.backbone\.graph: 'timm' needed, 'authors' fo"
    ):
        wrong.init_weights()
    ResNeSt(14, init_cfg=backbone.init_cfg).init_weights()  # at output stride 32 the graphs are one


def test_shared_keys_are_never_guessed(folder):
    done = convert(folder, 'unnamed.pth', 'none.pth')
    assert done.returncode == 2
    for source in ('official', 'encoding', 'timm'):
        assert re.search(rf'^  --source {source} ', done.stderr, re.M)
    done = convert(folder, 'unnamed.pth', 'official.pth', '--source', 'official')
    assert done.returncode == 0, done.stderr
    assert '(official), told by --source\n  architecture: resnest14, told by its shapes\n' in done.stdout
    origin = read_checkpoint(folder / 'official.pth')['meta'][ORIGIN]
    assert (origin['source'], origin['variant'], origin['options']['backbone.graph']) == (
        'official',
        'resnest14',
        'authors',
    )
    assert not (folder / 'none.pth').exists()


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


def test_weights_that_do_not_fit_are_not_written(tool, folder):
    weights = torch.load(folder / 'unnamed.pth')
    del weights['layer2.0.bn3.weight']
    weights['layer3.0.conv3.weight'] = weights['layer3.0.conv3.weight'][:5]
    torch.save(weights, folder / 'broken.pth')
    output = folder / 'out.pth'
    args = tool.make_parser().parse_args([str(folder / 'broken.pth'), str(output), '--source', 'official'])
    with pytest.raises(ValueError) as error:
        tool.convert_file(args)
    assert '1 missing in the file: layer2.0.bn3.weight\n' in str(error.value)
    assert '1 of another shape: layer3.0.conv3.weight: (5, 256, 1, 1) in the file, (1024,' in str(error.value)
    assert not output.exists()


def test_safetensors_that_are_none(folder):
    (folder / 'bad.safetensors').write_bytes(b'<html>')
    with pytest.raises(ValueError, match=r'bad\.safetensors: no safetensors file, or a damaged one \('):
        read_checkpoint(folder / 'bad.safetensors')


def test_where_nothing_is_written(tool, tmp_path):
    file = tmp_path / 'a.pth'
    file.write_bytes(b'kept')
    (tmp_path / 'link.pth').symlink_to(file)
    (tmp_path / 'b.pth').write_bytes(b'')

    def check(output, force=False):
        return tool.check_output(SimpleNamespace(input=str(file), output=str(tmp_path / output), force=force))

    for output in ('a.pth', 'link.pth'):
        with pytest.raises(UsageError, match='the input itself; name another file'):
            check(output, force=True)
    with pytest.raises(UsageError, match=r'b\.pth: is there already; .* overwrite it with --force'):
        check('b.pth')
    with pytest.raises(UsageError, match='a folder; name a file in it'):
        check('.')
    assert check('b.pth', force=True) == tmp_path / 'b.pth'
    assert check('c.pth') == tmp_path / 'c.pth'


# --------------------------------------------------------------------------------------------------------------------
# Whose, and which
# --------------------------------------------------------------------------------------------------------------------

OFFICIAL = Clue('official', 'resnest50_fast_2s1x64d', "its SHA-256: the authors' resnest50_fast_2s1x64d")
NAMED = Clue('timm', 'resnest50', "its name: timm's resnest50d")


def weights_of(variant):
    with torch.device('meta'):
        return ResNeSt(**VARIANTS[variant]).state_dict()


@pytest.mark.parametrize(
    ('given', 'by_hash', 'by_name', 'source'),
    [
        (None, OFFICIAL, None, 'official'),
        (None, OFFICIAL, NAMED, 'official'),  # the hash is sure
        (None, None, NAMED, 'timm'),
        ('official', None, NAMED, 'official'),  # the user knows better than a name
        ('encoding', OFFICIAL, None, 'encoding'),  # which computes the same
    ],
)
def test_what_tells_the_source(tool, given, by_hash, by_name, source):
    assert tool.find_source(weights_of('resnest14'), given, by_hash, by_name).source == source


def test_a_source_that_the_file_contradicts(tool):
    weights = weights_of('resnest14')
    with pytest.raises(
        UsageError, match=r"^--source timm: the file is told by its SHA-256: the authors' resnest50_fast"
    ):
        tool.find_source(weights, 'timm', OFFICIAL, None)
    with pytest.raises(UsageError, match=r'^--source mmseg: the keys are those of official or encoding or timm$'):
        tool.find_source(weights, 'mmseg', None, None)


SIBLINGS = ('resnest50', 'resnest50_fast_2s1x64d')


@pytest.mark.parametrize(
    ('weights', 'given', 'clue', 'variant', 'how'),
    [
        ('resnest50', None, OFFICIAL, 'resnest50_fast_2s1x64d', OFFICIAL.how),
        ('resnest50', None, NAMED, 'resnest50', NAMED.how),
        ('resnest50', None, Clue('timm', '', '--source'), 'resnest50', 'its shapes'),  # timm has no other
        ('resnest50', None, Clue('mmseg', '', 'its keys'), 'resnest50', 'its shapes'),
        ('resnest50', 'resnest50', Clue('official', '', '--source'), 'resnest50', '--variant'),
        ('resnest50', SIBLINGS[1], Clue('official', '', '--source'), SIBLINGS[1], '--variant'),
        ('resnest50_fast_4s1x64d', None, Clue('official', '', '--source'), 'resnest50_fast_4s1x64d', 'its shapes'),
    ],
)
def test_what_tells_the_variant(tool, weights, given, clue, variant, how):
    assert tool.find_variant(weights_of(weights), given, clue) == (variant, how)


FOUND = r'\(blocks \(3, 4, 6, 3\), stem_width 32, radix 2, groups 1, base_width 64\)'


def test_siblings_are_never_guessed(tool):
    message = r'say it \(they differ in their pools\):\n  --variant resnest50\n  --variant resnest50_fast_2s1x64d$'
    for source in ('official', 'encoding', 'encoding-fcn'):
        with pytest.raises(UsageError, match=message):
            tool.find_variant(weights_of('resnest50'), None, Clue(source, '', 'its keys'))


def test_a_variant_that_the_file_contradicts(tool):
    weights = weights_of('resnest50')
    with pytest.raises(
        UsageError, match=rf'^--variant resnest101: the weights {FOUND} are those of resnest50 or resnest'
    ):
        tool.find_variant(weights, 'resnest101', Clue('official', '', '--source'))
    with pytest.raises(UsageError, match=r'^--variant resnest50: .* are those of resnest50_fast_2s1x64d$'):
        tool.find_variant(weights, 'resnest50', OFFICIAL)
    with pytest.raises(
        ValueError, match=rf"^its name: timm's resnest101e, but the weights {FOUND} are those of resnest50$"
    ):
        tool.find_variant(weights, None, Clue('timm', 'resnest101', "its name: timm's resnest101e"))


def test_an_architecture_that_nobody_published(tool):
    with torch.device('meta'):
        weights = ResNeSt(50, radix=8).state_dict()
    expected = FOUND.replace('radix 2', 'radix 8')
    with pytest.raises(
        ValueError, match=rf'^no architecture of timm has these weights {expected}; expected one of resnest14'
    ):
        tool.find_variant(weights, None, Clue('timm', '', '--source'))
    with pytest.raises(
        ValueError, match=r'radix 4, groups 2, base_width 40\); expected one of resnest14, resnest26, resn'
    ):
        tool.find_variant(weights_of('resnest50_fast_4s2x40d'), None, Clue('mmseg', '', 'its keys'))


# --------------------------------------------------------------------------------------------------------------------
# What is kept of the meta
# --------------------------------------------------------------------------------------------------------------------

HEAD = {'decode_head.conv_seg.bias': torch.zeros(3)}


@pytest.mark.parametrize(
    ('meta', 'weights', 'kept'),
    [
        (dict(dataset_meta=dict(classes=CLASSES, palette=PALETTE)), HEAD, dict(classes=list(CLASSES), palette=PALETTE)),
        (dict(CLASSES=list(CLASSES), PALETTE=None), HEAD, dict(classes=list(CLASSES))),
        (dict(CLASSES=CLASSES, PALETTE=PALETTE[:2]), HEAD, dict(classes=list(CLASSES))),
        (dict(CLASSES=CLASSES[:2], PALETTE=PALETTE), HEAD, {}),  # not this head's
        (dict(CLASSES=(1, 2, 3)), HEAD, {}),
        (dict(CLASSES=CLASSES), {}, {}),  # a backbone
        ({}, HEAD, {}),
    ],
)
def test_classes_that_are_kept(tool, meta, weights, kept):
    assert tool.dataset_meta(meta, weights) == kept
