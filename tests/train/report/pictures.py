"""What a picture is."""

import numpy as np
from matplotlib.image import imread


def assert_picture(path):
    """It decodes, has some size, and is not blank."""
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
