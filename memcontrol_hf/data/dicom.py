"""DICOM files as images of Pillow: `PIL.Image.open` reads a `.dcm` file wherever it reads any other image."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

DICOM_SUFFIXES = (".dcm", ".dicom")


class DicomImage(ImageFile.ImageFile):
    """A DICOM file with one image, as Pillow's plugins read a file. Only the file's pixels are kept."""

    format = "DICOM"
    format_description = "DICOM"

    def _open(self) -> None:
        if self.fp.read(132)[128:] != b"DICM":
            raise SyntaxError("no DICOM file")  # Pillow then asks the next plugin
        try:
            from pydicom import dcmread
        except ImportError:
            raise ImportError("a DICOM file needs pydicom: pip install 'memcontrol_hf[dicom]'") from None
        self.fp.seek(0)
        shown = dicom_to_image(dcmread(self.fp))
        self._size, self._mode, self.im = shown.size, shown.mode, shown.im


def dicom_to_image(dicom: "FileDataset") -> Image.Image:
    """The image of a DICOM data set with the grey values of a viewer, from its darkest to its brightest.

    The modality LUT, the VOI LUT or window, and the presentation LUT are applied in this order (DICOM PS3.4, N.2); of
    `MONOCHROME1`, low values are bright. The darkest value that is shown becomes 0, and the brightest one
    the largest of 16 bits: a viewer leaves a dim image dim.

    Args:
        dicom (`pydicom.dataset.FileDataset`): a data set with pixels.

    Returns:
        `PIL.Image.Image`: gray with 16 bits (mode `I;16`), or RGB with 8 bits.

    Raises:
        ValueError: for a data set without pixels, with several frames, or with colours of more than 8 bits.
    """
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_presentation_lut, apply_voi_lut

    if "PixelData" not in dicom:
        raise ValueError("the DICOM file holds no pixels")
    if (frames := int(dicom.get("NumberOfFrames", 1) or 1)) > 1:
        raise ValueError(f"the DICOM file holds {frames} frames: save each frame that you need as a file of its own")
    pixels = dicom.pixel_array  # YCbCr comes as RGB
    if dicom.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dicom)
        pixels = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            raise ValueError(f"the DICOM file has colours of {8 * pixels.dtype.itemsize} bits: save them with 8")
        return Image.fromarray(pixels)
    shown = apply_presentation_lut(apply_voi_lut(apply_modality_lut(pixels, dicom), dicom), dicom).astype(np.float64)
    has_lut = "PresentationLUTShape" in dicom or "PresentationLUTSequence" in dicom
    if dicom.PhotometricInterpretation == "MONOCHROME1" and not has_lut:  # low values are bright and still are here
        shown = shown.max() - shown
    low, high = shown.min(), shown.max()
    return Image.fromarray(((shown - low) / max(high - low, 1e-6) * 65535).round().astype(np.uint16))


Image.register_open(DicomImage.format, DicomImage)
Image.register_extensions(DicomImage.format, list(DICOM_SUFFIXES))
