"""The corruptions of CIFAR-10-C for one image, the slow way: loops, OpenCV, SciPy and Pillow, in float64.

Each takes an image (32, 32, 3) uint8, its own NumPy generator and the constants, and gives (32, 32, 3) from 0 to 255
before the conversion to uint8.
"""

import colorsys
import io
import math

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

PIXELS = [(row, column) for row in range(32) for column in range(32)]


def normal(generator, *shape):
    return generator.standard_normal(shape, dtype=np.float32).astype(float)


def uniform(generator, *shape):
    return generator.random(shape, dtype=np.float32).astype(float)


def gaussian(image, sigma, **options):
    """Of the first two axes."""
    options = {"mode": "nearest"} | options
    return ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0)[: image.ndim], **options)


def clipped(image):
    return np.clip(image, 0, 1) * 255


# Noise


def gaussian_noise(image, generator, sd):
    return clipped(image / 255 + sd * normal(generator, 3, 32, 32).transpose(1, 2, 0))


def shot_noise(image, generator, photons):
    rates = image.transpose(2, 0, 1).astype(np.float32) / np.float32(255) * np.float32(photons)
    counts = np.array([generator.poisson(rate) for rate in rates.ravel()]).reshape(3, 32, 32)
    return clipped(counts.transpose(1, 2, 0) / photons)


def impulse_noise(image, generator, fraction):
    image = image.astype(float)
    numbers = uniform(generator, 3, 32, 32)
    for channel in range(3):
        for row, column in PIXELS:
            if numbers[channel, row, column] < fraction:
                image[row, column, channel] = 255 if numbers[channel, row, column] < fraction / 2 else 0
    return image


def speckle_noise(image, generator, sd):
    return clipped(image / 255 * (1 + sd * normal(generator, 3, 32, 32).transpose(1, 2, 0)))


# Blur


def gaussian_blur(image, generator, sigma):
    return clipped(gaussian(image / 255, sigma))


def defocus_blur(image, generator, radius, alias_sigma):
    x, y = np.meshgrid(np.arange(-8, 9), np.arange(-8, 9))
    disk = np.array(x**2 + y**2 <= radius**2, float)
    kernel = cv2.GaussianBlur(disk / disk.sum(), ksize=(3, 3), sigmaX=alias_sigma)
    return clipped(cv2.filter2D(image / 255, -1, kernel))


def glass_blur(image, generator, sigma, times):
    image = np.uint8(gaussian(image / 255, sigma) * 255 + 1e-4)  # as `corrupt`, for 16.999999999
    for _ in range(times):
        shift = -1 * (uniform(generator, 2, 32, 32) < 0.5)
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                there = row + shift[0, row, column], column + shift[1, row, column]
                # As make_cifar_c.py has it: the views on the right are read one after the other.
                image[row, column], image[there] = image[there], image[row, column]
    return clipped(gaussian(image / 255, sigma))


def ray_blur(image, degrees, radius, sigma):
    """ImageMagick's motion blur of (32, 32, C) from 0 to 255, rounded."""
    weights = [math.exp(-(step**2) / (2 * sigma**2)) for step in range(2 * radius + 1)]
    result = np.zeros(image.shape)
    for row, column in PIXELS:
        for step, weight in enumerate(weights):
            right = math.ceil(step * math.cos(math.radians(degrees)) - 0.5)
            down = math.ceil(step * math.sin(math.radians(degrees)) - 0.5)
            source = min(max(row + down, 0), 31), min(max(column + right, 0), 31)
            result[row, column] += weight / sum(weights) * image[source]
    return np.floor(result + 0.5)


def motion_blur(image, generator, radius, sigma):
    return ray_blur(image, np.float32(90) * generator.random(dtype=np.float32) - np.float32(45), radius, sigma)


def clipped_zoom(image, factor):
    size = math.ceil(32 / factor)
    top = (32 - size) // 2
    zoomed = ndimage.zoom(image[top : top + size, top : top + size], (factor, factor, 1), order=1)
    top = (len(zoomed) - 32) // 2
    return zoomed[top : top + 32, top : top + 32]


def zoom_blur(image, generator, largest):
    factors = np.arange(1, largest, 0.01)
    return clipped((image / 255 + sum(clipped_zoom(image / 255, factor) for factor in factors)) / (len(factors) + 1))


# Weather


def snow(image, generator, mean, sd, zoom, least, radius, sigma, share):
    image = image / 255
    flakes = clipped_zoom(mean + sd * normal(generator, 32, 32)[..., None], zoom)
    flakes[flakes < least] = 0
    flakes = np.uint8(np.clip(flakes, 0, 1) * 255).astype(float)
    degrees = np.float32(90) * generator.random(dtype=np.float32) - np.float32(135)
    flakes = ray_blur(flakes, degrees, radius, sigma) / 255
    grey = cv2.cvtColor(np.float32(image), cv2.COLOR_RGB2GRAY)[..., None]
    return clipped(share * image + (1 - share) * np.maximum(image, grey * 1.5 + 0.5) + flakes + np.rot90(flakes, k=2))


def plasma(generator, decay):
    """Diamond-square: the middle of each square, of its upper and of its left side, on a torus."""
    heights = np.zeros((32, 32))
    step, wobble = 32, 100.0
    while step >= 2:
        half, count = step // 2, 32 // step
        noise = (2 * uniform(generator, 3, count, count) - 1) * wobble**2
        squares = [(row, column) for row in range(0, 32, step) for column in range(0, 32, step)]

        def mean(*points):
            return sum(heights[row % 32, column % 32] for row, column in points) / 4

        for row, column in squares:
            corners = [(row, column), (row + step, column), (row, column + step), (row + step, column + step)]
            heights[row + half, column + half] = mean(*corners) + noise[0, row // step, column // step]
        for row, column in squares:
            upper = [(row, column), (row, column + step), (row + half, column + half), (row - half, column + half)]
            heights[row, column + half] = mean(*upper) + noise[1, row // step, column // step]
            left = [(row, column), (row + step, column), (row + half, column + half), (row + half, column - half)]
            heights[row + half, column] = mean(*left) + noise[2, row // step, column // step]
        step, wobble = step // 2, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


def frost(image, generator, scale, weight):
    cloud = plasma(generator, 1.5)
    ice = np.zeros((32, 32, 3))
    for row, column in PIXELS:
        vein = 1 - abs(2 * cloud[row, column] - 1)
        ice[row, column] = (0.15 + 0.85 * vein**2) * np.array([0.78, 0.9, 1])
    return clipped(scale * image / 255 + weight * ice)


def fog(image, generator, amount, decay):
    image = image / 255
    largest = image.max()
    return clipped((image + amount * plasma(generator, decay)[..., None]) * largest / (largest + amount))


def spatter(image, generator, mean, sd, sigma, least, strength, is_mud):
    image = image / 255
    liquid = gaussian(mean + sd * normal(generator, 32, 32), sigma)
    liquid[liquid < least] = 0
    if is_mud:
        cover = gaussian(np.where(liquid > least, 1, 0), strength)
        cover[cover < 0.8] = 0
        return clipped(image * (1 - cover[..., None]) + cover[..., None] * np.array([63, 42, 20]) / 255)
    liquid = (liquid * 255).astype(np.int64).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    _, distance = cv2.threshold(distance, 20, 20, cv2.THRESH_TRUNC)
    relief = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    relief = cv2.filter2D(relief, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    drops = liquid * cv2.blur(relief, (3, 3)).astype(float)
    drops *= strength / drops.max()
    return clipped(image + drops[..., None] * np.array([175, 238, 238]) / 255)


# Colour and compression


def by_hsv(image, change):
    result = np.zeros(image.shape)
    for place in PIXELS:
        result[place] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*image[place] / 255)))
    return clipped(result)


def brightness(image, generator, more):
    return by_hsv(image, lambda hue, saturation, value: (hue, saturation, min(value + more, 1)))


def saturate(image, generator, factor, more):
    return by_hsv(image, lambda hue, saturation, value: (hue, min(saturation * factor + more, 1), value))


def contrast(image, generator, factor):
    image = image / 255
    means = np.mean(image, axis=(0, 1), keepdims=True)
    return clipped((image - means) * factor + means)


def elastic_transform(image, generator, shift, sigma, corner):
    points = np.float32([[26, 26], [26, 6], [6, 6]])
    moved = points + np.float32(corner * (2 * uniform(generator, 3, 2) - 1))
    matrix = cv2.getAffineTransform(points, moved)
    image = cv2.warpAffine(np.float32(image / 255), matrix, (32, 32), borderMode=cv2.BORDER_REFLECT_101)
    if shift:
        x, y = (
            shift * gaussian(2 * field - 1, sigma, mode="reflect", truncate=3)
            for field in uniform(generator, 2, 32, 32)
        )
        rows, columns = np.mgrid[:32, :32]
        channels = [
            ndimage.map_coordinates(image[..., channel], (rows + y, columns + x), order=1, mode="reflect")
            for channel in range(3)
        ]
        image = np.stack(channels, 2)
    return clipped(image)


def pixelate(image, generator, scale):
    small = Image.fromarray(image).resize((int(32 * scale), int(32 * scale)), Image.Resampling.BOX)
    return np.asarray(small.resize((32, 32), Image.Resampling.BOX))


def jpeg_compression(image, generator, quality):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))
