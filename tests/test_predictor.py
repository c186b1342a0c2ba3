"""Predictor on paths, arrays, tensors and iterators, against mmsegmentation's inference on the same checkpoint."""

import copy
import shutil
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.models import EncoderDecoder as MMSegEncoderDecoder
from mmseg.registry import MODELS
from PIL import Image
from tiny import CAMVID

from mmseg_resnest.network import Speed
from mmseg_resnest.predictor import Predictor, check_image
from mmseg_resnest.segmentor import EncoderDecoder

SIZES = [(48, 64), (40, 90), (48, 64), (70, 52), (48, 64)]
AS_IT_IS = Speed(fold=False, graphs=False)


def tiny_config(type_='mmseg_resnest.EncoderDecoder', classes=None):
    cfg = Config.fromfile(CAMVID)
    cfg.merge_from_dict({'model.type': type_, 'model.backbone.depth': 14, 'model.backbone.init_cfg': None})
    cfg.model.decode_head.channels = cfg.model.auxiliary_head.channels = 8
    if classes:
        cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = len(classes)
        cfg.test_dataloader.dataset.metainfo = dict(classes=classes)
    for pipeline in (cfg.test_pipeline, cfg.test_dataloader.dataset.pipeline):
        pipeline[1].scale = (64, 48)
    return cfg


def write_checkpoint(path, classes=None):
    """Writes random weights with settled statistics, whose label maps have several classes."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(tiny_config('mmseg.EncoderDecoder', classes).model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    with torch.no_grad():
        model.train()._forward(torch.randn(8, 3, 48, 64))
    classes = classes or Config.fromfile(CAMVID).test_dataloader.dataset.metainfo.classes
    meta = dict(
        dataset_meta=dict(classes=classes, palette=[[i % 256, 2 * i % 256, 3 * i % 256] for i in range(len(classes))])
    )
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp('predictor')
    write_checkpoint(root / 'model.pth')
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        coarse = random.integers(0, 256, (4, 5, 3), np.uint8)
        cv2.imwrite(str(root / f'{i}.png'), cv2.resize(coarse, (width, height)))
    return root


@pytest.fixture(scope='module')
def predictor(files):
    return Predictor(tiny_config(), files / 'model.pth', 'cpu', AS_IT_IS, batch_size=2)


@pytest.fixture(scope='module')
def paths(files):
    return [str(files / f'{i}.png') for i in range(len(SIZES))]


@pytest.fixture(scope='module')
def truth(files, paths):
    """mmsegmentation's own model, one image at a time."""
    model = init_model(tiny_config('mmseg.EncoderDecoder'), str(files / 'model.pth'), 'cpu')
    labels = [inference_model(model, path).pred_sem_seg.data[0].numpy() for path in paths]
    assert all(len(np.unique(part)) > 1 for part in labels)
    return labels


def assert_same(found, truth):
    assert len(found) == len(truth)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == np.uint8
        assert one.shape == other.shape
        assert (one != other).mean() <= 1e-3  # batched convolutions round otherwise


def test_paths_arrays_tensors_and_iterators(predictor, paths, truth):
    arrays = [cv2.imread(path) for path in paths]
    tensors = [torch.from_numpy(array[..., ::-1].copy()).permute(2, 0, 1) for array in arrays]
    assert_same(predictor(paths), truth)
    assert_same(predictor(arrays), truth)
    assert_same(predictor([tensors[0], paths[1], arrays[2], tensors[3], arrays[4]]), truth)
    assert_same([predictor(tensors[3])], truth[3:4])
    assert_same([predictor(paths[1])], truth[1:2])
    assert_same([predictor(np.repeat(arrays[1], 2, axis=1)[:, ::2])], truth[1:2])  # strided
    assert_same([predictor(arrays[1].transpose(1, 0, 2).copy().transpose(1, 0, 2))], truth[1:2])
    assert predictor([]) == list(predictor(iter([]))) == []


def test_an_iterator_stays_one(predictor, paths, truth):
    taken = []

    def stream():
        for i in range(25):
            taken.append(i)
            yield paths[i % 5]

    results = predictor(stream())
    assert taken == []
    assert_same([next(results)], truth[:1])
    assert len(taken) == 8  # four batches of two
    assert_same(list(results), (truth * 5)[1:])


def test_what_comes_before_a_bad_image_comes_first(predictor, paths, truth, tmp_path):
    (tmp_path / 'bad.png').write_text('hello')
    found = []
    with pytest.raises(ValueError, match=r'bad\.png: no picture'):
        found.extend(predictor(iter([*(paths * 2), tmp_path / 'bad.png', *paths])))
    assert_same(found, truth * 2)


def test_what_comes_before_an_iterators_error_comes_first(predictor, paths, truth):
    def stream():
        yield from paths[:3]
        raise KeyError('camera')

    results = predictor(stream())
    assert_same([next(results) for _ in range(3)], truth[:3])
    with pytest.raises(KeyError, match='camera'):
        next(results)


def test_fast_network_gives_the_same(files, paths, truth):
    assert_same(Predictor(tiny_config(), files / 'model.pth', 'cpu', batch_size=2)(paths), truth)


def test_config_by_path(files, tmp_path, truth, paths):
    tiny_config('mmseg.EncoderDecoder').dump(tmp_path / 'config.py')
    predictor = Predictor(tmp_path / 'config.py', files / 'model.pth', 'cpu', AS_IT_IS)
    assert_same(predictor(paths), truth)
    assert predictor.classes[0] == 'sky'
    assert predictor.palette[2].tolist() == [2, 4, 6]


def test_mmsegmentations_own_inference(files, paths, truth):
    model = init_model(tiny_config(), str(files / 'model.pth'), 'cpu')
    found = inference_model(model, [paths[0], paths[2]])
    assert_same([sample.pred_sem_seg.data[0].numpy() for sample in found], [truth[0], truth[2]])
    assert found[0].seg_logits.shape == SIZES[0]
    inferencer = MMSegInferencer(tiny_config(), str(files / 'model.pth'), device='cpu', scope='mmseg')
    result = inferencer([paths[1]], return_datasamples=False, show=False)
    assert_same([result['predictions'].astype(np.uint8)], truth[1:2])


# -------------------------------------------------------------------------------------------------------- bad input


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)


RGB = np.full((20, 30, 3), 90, np.uint8)
BAD = {
    'missing': (lambda path: None, 'there is no such file; expected'),
    'empty': (lambda path: path.write_bytes(b''), '0 bytes; expected a picture of 8 bits'),
    'text': (lambda path: path.write_text('hello'), "no picture that can be read: it begins with b'hello'"),
    'cut off': (
        lambda path: (save(path, RGB, format='JPEG'), path.write_bytes(path.read_bytes()[:-300])),
        'cut off|Trunc',
    ),
    '16 bits': (lambda path: save(path, RGB[..., 0].astype(np.uint16) * 99), r'other numbers than 8 bits \(mode'),
    '16 bits in colour': (lambda path: cv2.imwrite(str(path), RGB.astype(np.uint16) * 99), r'than 8 bits \(.*16B\)'),
    'alpha': (lambda path: save(path, np.dstack([RGB, RGB[..., 0]])), r'an alpha channel \(mode RGBA\); expe'),
    'transparent colour': (lambda path: save(path, RGB, transparency=(0, 0, 0)), 'an alpha channel'),
    'transparent grey': (lambda path: save(path, RGB[..., 0], transparency=3), 'an alpha channel'),
    'transparent palette': (
        lambda path: Image.fromarray(RGB).convert('P').save(path, transparency=bytes([0] * 100 + [255] * 156)),
        r'an alpha channel \(mode P with transparency\)',
    ),
    'one transparent of a palette': (
        lambda path: Image.fromarray(RGB).convert('P').save(path, transparency=0),
        'an alpha channel',
    ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_files_are_named(case, predictor, tmp_path):
    path = tmp_path / 'bad.png'
    spoil, message = BAD[case]
    spoil(path)
    with pytest.raises(ValueError, match=f'{path}: .*({message})'):
        predictor(path)


@pytest.mark.parametrize(
    ('image', 'found'),
    [
        (RGB[..., 0], r'ndarray \(20, 30\), uint8'),
        (RGB / 255, r'ndarray \(20, 30, 3\), float64'),
        (np.dstack([RGB, RGB]), r'ndarray \(20, 30, 6\)'),
        (torch.zeros(20, 30, 3, dtype=torch.uint8), r'Tensor \(20, 30, 3\)'),
        (torch.zeros(3, 20, 30), r'Tensor \(3, 20, 30\), torch.float32'),
        (RGB[:0], 'expected at least one pixel'),
        (RGB > 9, r'ndarray \(20, 30, 3\), bool'),
        (RGB[None], r'ndarray \(1, 20, 30, 3\), uint8'),
        (Image.fromarray(RGB), 'an image is Image; expected a path, an array'),
        ([None], 'an image is NoneType; expected a path, an array'),
    ],
)
def test_bad_arrays_are_refused(image, found, predictor):
    with pytest.raises(ValueError, match=found):
        predictor(image)


def test_a_turned_file_is_predicted_as_it_is_shown(predictor, paths, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(paths[1])
    picture.save(tmp_path / 'turned.png', exif=exif)
    shown = cv2.rotate(cv2.imread(paths[1]), cv2.ROTATE_90_CLOCKWISE)
    assert predictor(tmp_path / 'turned.png').shape == (90, 40)
    assert np.array_equal(predictor(tmp_path / 'turned.png'), predictor(shown))


@pytest.mark.parametrize('suffix', ['.ppm', '.jp2'])
def test_other_formats_of_16_bits_are_refused(suffix, tmp_path):
    """Pillow says RGB of them."""
    path = tmp_path / f'a{suffix}'
    picture = np.random.default_rng(0).integers(0, 256, (64, 72, 3), np.uint8)
    cv2.imwrite(str(path), picture)
    check_image(path)
    cv2.imwrite(str(path), picture.astype(np.uint16) * 257)
    with pytest.raises(ValueError, match=r'other numbers than 8 bits \(mode uint16 of 3 channels\)'):
        check_image(path)


def test_grey_files_are_fine(tmp_path):
    save(tmp_path / 'grey.png', RGB[..., 0])
    check_image(tmp_path / 'grey.png')


def test_logits_that_are_not_finite_are_refused(files, paths):
    predictor = Predictor(tiny_config(), files / 'model.pth', 'cpu', AS_IT_IS)
    predictor.model.decode_head.conv_seg.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=f'^{paths[0]}: the logits are not finite'):
        predictor(paths[0])


def test_logits_of_a_head_that_predicts_by_itself_are_looked_at_too(files, paths):
    predictor = Predictor(tiny_config(), files / 'model.pth', 'cpu', AS_IT_IS)
    predictor.model.predict = partial(MMSegEncoderDecoder.predict, predictor.model)
    assert predictor(paths[0]).shape
    predictor.model.decode_head.conv_seg.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=f'^{paths[0]}: the logits are not finite'):
        predictor(paths[0])


def test_arrays_whose_logits_are_not_finite_have_no_name(files):
    predictor = Predictor(tiny_config(), files / 'model.pth', 'cpu', AS_IT_IS)
    predictor.model.decode_head.conv_seg.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=r'^an image without a path: the logits are not finite'):
        predictor(np.zeros((32, 48, 3), np.uint8))


@pytest.mark.parametrize('kind', ['EncoderDecoder', 'mmseg.EncoderDecoder', MMSegEncoderDecoder])
def test_mmsegmentations_segmentor_becomes_ours(kind, files):
    cfg = tiny_config()
    cfg.model.type = kind
    assert type(Predictor(cfg, files / 'model.pth', 'cpu').model) is EncoderDecoder


def test_no_batch_is_of_no_images(files):
    with pytest.raises(ValueError, match='batch_size=0; expected 1 or more'):
        Predictor(tiny_config(), files / 'model.pth', 'cpu', batch_size=0)


def test_palettes_whose_every_colour_is_opaque_are_fine(tmp_path):
    Image.fromarray(RGB).convert('P').save(tmp_path / 'opaque.png', transparency=bytes([255] * 256))
    assert set(Image.open(tmp_path / 'opaque.png').info['transparency']) == {255}
    check_image(tmp_path / 'opaque.png')


def test_a_checkpoint_that_does_not_fit_is_refused(files, tmp_path):
    cfg = copy.deepcopy(tiny_config())
    cfg.model.decode_head.channels = 16
    with pytest.raises(ValueError, match=r'model\.pth .*does not fit'):
        Predictor(cfg, files / 'model.pth', 'cpu')
    shutil.copy(files / 'model.pth', tmp_path / 'cut.pth')
    (tmp_path / 'cut.pth').write_bytes((tmp_path / 'cut.pth').read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r'cut\.pth'):
        Predictor(tiny_config(), tmp_path / 'cut.pth', 'cpu')
