// From the pixels of any image to what the networks were trained on: the data set's size, grey or colour, mean and
// deviation. Pure functions on arrays; `picture` is {width, height, planes: [Float64Array, ...]} with values 0..255.

const halfToEven = (value) => {
  const low = Math.floor(value);
  const rest = value - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? low + 1 : low;
};
const whole = (value) => Math.min(255, Math.max(0, Math.floor(value + 0.5)));
const pixel = (value) => Math.min(255, Math.max(0, halfToEven(value)));

/** RGBA bytes without transparency, in place, as training shows images: on white, or on black where all would be nearly
 *  white on white; alpha that is the same everywhere is dropped. */
export function makeOpaque(rgba) {
  const alphas = rgba.filter((_, i) => i % 4 === 3);
  const varies = alphas.some((alpha) => alpha !== alphas[0]);
  const on = (ground, i) => Math.round((rgba[i] * alphas[i >> 2] + ground * (255 - alphas[i >> 2])) / 255);
  const ground = rgba.some((_, i) => i % 4 < 3 && on(255, i) < 240) ? 255 : 0;
  for (let i = 0; i < rgba.length; i++) rgba[i] = i % 4 === 3 ? 255 : varies ? on(ground, i) : rgba[i];
}

/** RGBA bytes to one grey plane (ITU-R 601 luma in Pillow's integers) or to three planes. */
export function pictureOf(rgba, width, height, grey) {
  const planes = Array.from({ length: grey ? 1 : 3 }, () => new Float64Array(width * height));
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = rgba.subarray(4 * i, 4 * i + 3);
    if (grey) planes[0][i] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
    else [planes[0][i], planes[1][i], planes[2][i]] = [r, g, b];
  }
  return { width, height, planes };
}

/** By distance: a triangle of reach 1, and Keys' cubic with a = -1/2 of reach 2. */
const KERNELS = {
  bilinear: { reach: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    reach: 2,
    at: (x) => {
      const d = Math.abs(x);
      if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
      return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
    },
  },
};

/** For each place of the output: where its inputs start, and their weights. The kernel is as wide as the step between
 *  outputs, so that nothing is skipped when an image shrinks (antialiasing, as in PyTorch and Pillow). */
function weightsFor(from, to, kernel) {
  const step = from / to;
  const wide = Math.max(1, step);
  const reach = kernel.reach * wide;
  return Array.from({ length: to }, (_, place) => {
    const centre = step * (place + 0.5);
    const start = Math.max(0, Math.trunc(centre - reach + 0.5));
    const end = Math.min(from, Math.trunc(centre + reach + 0.5));
    const raw = Array.from({ length: end - start }, (_, i) => kernel.at((i + start - centre + 0.5) / wide));
    const sum = raw.reduce((total, weight) => total + weight, 0);
    return { start, weights: raw.map((weight) => weight / sum) };
  });
}

function resizePlane(plane, width, height, toWidth, toHeight, kernel, wholeBetween) {
  const narrow = new Float64Array(toWidth * height);
  weightsFor(width, toWidth, kernel).forEach(({ start, weights }, x) => {
    for (let y = 0; y < height; y++) {
      let sum = 0;
      weights.forEach((weight, i) => (sum += weight * plane[y * width + start + i]));
      narrow[y * toWidth + x] = wholeBetween ? whole(sum) : sum;
    }
  });
  const resized = new Float64Array(toWidth * toHeight);
  weightsFor(height, toHeight, kernel).forEach(({ start, weights }, y) => {
    for (let x = 0; x < toWidth; x++) {
      let sum = 0;
      weights.forEach((weight, i) => (sum += weight * narrow[(start + i) * toWidth + x]));
      resized[y * toWidth + x] = wholeBetween ? whole(sum) : pixel(sum);
    }
  });
  return resized;
}

/** Whole values 0..255. `wholeBetween` rounds after each direction, as Pillow does; without it, once, as PyTorch. */
export function resize(picture, width, height, kernel = "bilinear", wholeBetween = false) {
  if (picture.width === width && picture.height === height) return picture;
  const planes = picture.planes.map((plane) =>
    resizePlane(plane, picture.width, picture.height, width, height, KERNELS[kernel], wholeBetween),
  );
  return { width, height, planes };
}

/** A rectangle of a picture; what lies outside is black. */
export function crop(picture, left, top, width, height) {
  const planes = picture.planes.map((plane) => {
    const part = new Float64Array(width * height);
    for (let y = Math.max(0, -top); y < Math.min(height, picture.height - top); y++)
      for (let x = Math.max(0, -left); x < Math.min(width, picture.width - left); x++)
        part[y * width + x] = plane[(y + top) * picture.width + x + left];
    return part;
  });
  return { width, height, planes };
}

const squared = (picture, side) =>
  crop(picture, Math.round((picture.width - side) / 2), Math.round((picture.height - side) / 2), side, side);

/** The negative of a picture with a bright border: these data sets show bright things on black. */
function onBlack(picture) {
  const { width, height } = picture;
  let sum = 0;
  for (let x = 0; x < width; x++) sum += picture.planes[0][x] + picture.planes[0][(height - 1) * width + x];
  for (let y = 0; y < height; y++) sum += picture.planes[0][y * width] + picture.planes[0][y * width + width - 1];
  if (sum / (2 * (width + height)) <= 127) return picture;
  return { ...picture, planes: picture.planes.map((plane) => plane.map((value) => 255 - value)) };
}

/** The smallest part of a picture that holds every value above `level`, in the middle of a black square; null when
 *  there is none. */
function trimmed(picture, level) {
  let [left, top, right, bottom] = [picture.width, picture.height, -1, -1];
  picture.planes[0].forEach((value, i) => {
    if (value <= level) return;
    const [x, y] = [i % picture.width, Math.floor(i / picture.width)];
    [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
  });
  if (right < 0) return null;
  const [width, height] = [right - left + 1, bottom - top + 1];
  return squared(crop(picture, left, top, width, height), Math.max(width, height));
}

/** A drawn digit as the digits of the data set were made from forms: the box of its ink, fitted into 32 x 32 places
 *  that are ink or not, counted in blocks of 4 x 4. Returns 8 x 8 values of 0..255, or null where there is no ink. */
function digitOf(picture) {
  const box = trimmed(picture, 127);
  if (!box) return null;
  const places = resize(box, 32, 32).planes[0];
  const counts = new Float64Array(64);
  places.forEach((value, i) => (counts[8 * (i >> 7) + ((i & 31) >> 2)] += value > 127));
  return { width: 8, height: 8, planes: [counts.map((count) => halfToEven((count * 255) / 16))] };
}

/** What the networks see of a picture: `spec.size` pixels a side, whole values 0..255; null where there is nothing. */
export function seen(picture, spec) {
  const { size, native, fit, kernel } = spec;
  if (fit === "file") {
    const least = Math.min(picture.width, picture.height);
    const sideOf = (side) => (spec.keepsAspect ? Math.trunc((spec.resize * side) / least) : spec.resize);
    const [width, height] = [sideOf(picture.width), sideOf(picture.height)];
    const corner = (side) => halfToEven((side - size) / 2);
    return crop(resize(picture, width, height, kernel, true), corner(width), corner(height), size, size);
  }
  if (picture.width !== native || picture.height !== native) {
    if (fit === "ink") picture = digitOf(onBlack(picture));
    else if (fit === "trim") picture = trimmed(onBlack(picture), 25);
    else picture = squared(picture, Math.min(picture.width, picture.height));
    if (!picture) return null;
    picture = resize(picture, native, native);
  }
  return resize(picture, size, size, kernel);
}

/** float32 [1, 3, size, size], normalised; grey becomes three equal channels. */
export function inputOf(picture, spec) {
  const area = picture.width * picture.height;
  const input = new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel++) {
    const plane = picture.planes[channel % picture.planes.length];
    for (let i = 0; i < area; i++)
      input[channel * area + i] = Math.fround(plane[i] * Math.fround(spec.scale[channel])) + Math.fround(spec.bias[channel]);
  }
  return input;
}

/** Logits to probabilities. */
export function softmax(logits) {
  const largest = Math.max(...logits);
  const parts = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = parts.reduce((total, part) => total + part, 0);
  return parts.map((part) => part / sum);
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
