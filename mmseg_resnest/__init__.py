"""ResNeSt (split-attention networks, arXiv 2004.08955) for OpenMMLab semantic segmentation."""

from mmengine.config.utils import MODULE2PACKAGE

__version__ = '0.1.0'

# MMEngine resolves `_base_ = 'package::folder/config.py'` only for packages in this table, and maps mmseg to the name
# of a distribution that the maintained one does not bear. With import names both resolve, however they were installed.
MODULE2PACKAGE.update(mmseg_resnest='mmseg_resnest', mmseg='mmseg')

from mmseg_resnest.resnest import ResNeSt  # noqa: E402

__all__ = ['ResNeSt', '__version__']
