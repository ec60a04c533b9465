"""Places of a layer's grid in an image, and back: what a click means, and where to draw."""

from devil_hf.model.image_processing_devil import CropGeometry, DevilImageProcessor


def crop_to_image(geometry: CropGeometry, y: float, x: float) -> tuple[float, float]:
    """Continuous (y, x) in the crop that the backbone sees -> (y, x) in the image; pixel i covers [i, i + 1)."""
    (height, width), (resized_height, resized_width), (top, left) = (geometry.image_size, geometry.resized_size, geometry.offset)
    return (y + top) * (height / resized_height), (x + left) * (width / resized_width)


def crop_box(geometry: CropGeometry) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the crop in image pixels; beyond the image where the crop was padded."""
    top, left = crop_to_image(geometry, 0, 0)
    bottom, right = crop_to_image(geometry, *geometry.crop_size)
    return left, top, right, bottom


def location_to_box(
    image_processor: DevilImageProcessor, location: tuple[int, int], grid_size: tuple[int, int], image_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The part of an image that a location stands for: its cell of the grid that a layer lays over the crop.

    Args:
        location: (row, column) in the grid of a layer.
        grid_size: (H_l, W_l) of that layer.
        image_size: (height, width) of the upright image.

    Returns:
        (left, top, right, bottom) in pixels of the image, clipped to the image.
    """
    (row, column), (rows, columns) = location, grid_size
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"location {tuple(location)} is outside the {rows} x {columns} grid; rows and columns start at 0")
    geometry = image_processor.geometry(image_size)
    crop_height, crop_width = geometry.crop_size
    top, left = crop_to_image(geometry, row * crop_height / rows, column * crop_width / columns)
    bottom, right = crop_to_image(geometry, (row + 1) * crop_height / rows, (column + 1) * crop_width / columns)
    height, width = geometry.image_size
    x0, x1 = (min(max(x, 0.0), float(width)) for x in (left, right))
    y0, y1 = (min(max(y, 0.0), float(height)) for y in (top, bottom))
    return x0, y0, x1, y1


def pixel_to_location(
    image_processor: DevilImageProcessor, x: float, y: float, grid_size: tuple[int, int], image_size: tuple[int, int]
) -> tuple[int, int] | None:
    """The (row, column) of a layer's grid under pixel (x, y) of an image; None where the crop does not reach.

    Args:
        x, y: pixel of the upright image, counted from its top left corner, as a click gives them.
        grid_size: (H_l, W_l) of the layer.
        image_size: (height, width) of the upright image.
    """
    height, width = image_size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"pixel x={x}, y={y} is outside the image of width {width} and height {height}")
    geometry = image_processor.geometry(image_size)
    crop_y, crop_x = geometry.image_to_crop(int(y) + 0.5, int(x) + 0.5)
    row, column = (int(v * n // edge) for v, n, edge in zip((crop_y, crop_x), grid_size, geometry.crop_size, strict=True))
    return (row, column) if 0 <= row < grid_size[0] and 0 <= column < grid_size[1] else None


__all__ = ["crop_box", "crop_to_image", "location_to_box", "pixel_to_location"]
