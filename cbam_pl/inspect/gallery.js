"use strict";
// Draws the gallery from the JSON in the page; gallery.py says what it holds.

const content = JSON.parse(document.getElementById("content").textContent);
const { classes, images, networks } = content;
const colours = decode(content.colours); // 256 times red, green, blue, opacity
const palette = new Uint32Array(colours.buffer); // the same, a colour in one number
const form = document.getElementById("filters");
const list = document.getElementById("images");
const dialog = document.getElementById("enlarged");
const places = images.number.map((_, index) => index);
let shown = places; // indices of the images that pass the filters, in their order on the page
let current = 0; // place in `shown` of the enlarged image

function decode(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) bytes[index] = text.charCodeAt(index);
  return bytes;
}

/** An element with properties and children, which are elements or text; null children are left out. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Predictions

const predicted = (network, image) => network.top[image][0][0];
const confidence = (network, image) => network.top[image][0][1];
const isRight = (network, image) => predicted(network, image) === images.label[image];
const inPercent = (value) => (100 * value).toFixed(1);
const percent = (value) => `${inPercent(value)}\u00a0%`; // they stay on one line
const nameOf = ({ name }) => (networks.length > 1 ? make("span", { className: "name" }, name) : null);
const nameOfImage = (image) => `image ${images.number[image]}: ${classes[images.label[image]]}`;
const verdict = (right) => make("strong", { className: right ? "right" : "wrong" }, right ? "✓ right" : "✗ wrong");

// Maps

/** The bytes of one image's map, decoded when they are first needed. */
function valuesOf(map, image) {
  map.values ??= decode(map.bytes);
  const size = map.shape.reduce((product, side) => product * side);
  return map.values.subarray(image * size, (image + 1) * size);
}

/** A map of an image, height × width bytes, as a canvas of side × side: interpolated between the positions' centres. */
function drawMap(map, image, side) {
  const [height, width] = map.shape;
  const values = valuesOf(map, image);
  const canvas = make("canvas", { width: side, height: side });
  const pixels = new Uint32Array(side * side);
  const columns = neighbours(width, side);
  neighbours(height, side).forEach(([top, bottom, down], y) =>
    columns.forEach(([left, right, across], x) => {
      const along = (row) => values[row * width + left] * (1 - across) + values[row * width + right] * across;
      pixels[y * side + x] = palette[Math.round(along(top) * (1 - down) + along(bottom) * down)];
    }),
  );
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), side), 0, 0);
  return canvas;
}

/** For each of `side` pixels along `length` values: the values before and after it, and the weight of the second. */
function neighbours(length, side) {
  return Array.from({ length: side }, (_, pixel) => {
    const position = Math.min(Math.max(((pixel + 0.5) * length) / side - 0.5, 0), length - 1);
    const before = Math.floor(position);
    return [before, Math.min(before + 1, length - 1), position - before];
  });
}

function picture(image, side, map, name) {
  const frame = make("span", { className: map ? "picture map" : "picture" });
  frame.append(make("img", { src: images.picture[image], alt: "" }));
  if (map) frame.append(drawMap(map, image, side));
  frame.role = "img";
  frame.ariaLabel = name;
  return frame;
}

const noMap = (text) => make("span", { className: "picture none" }, text);

/** The size of a gate, and which part of it the page has. */
function reduced(map, unit) {
  const full = map.full.join("×");
  const kept = map.shape.join("×");
  return full === kept ? `${full}${unit}` : `${kept} of ${full}${unit}`;
}

/** A map over the image; of a spatial gate, also how many positions it has. */
function spatialPanel(map, image, name) {
  if (!map) return null;
  const ends = [map.low, map.high].map((value) => value.toFixed(2));
  const scale = make("span", { className: "scale" }, ends[0], make("span", { className: "bar" }), ends[1]);
  const label = `${name}, colours from ${ends.join(" to ")}`;
  const size = map.full ? reduced(map, "") : null;
  return make("figure", {}, picture(image, 128, map, label), make("figcaption", {}, scale, size));
}

/** The mean of each channel over the images, in bytes. */
function meansOf(map) {
  const sums = Array(map.shape[0]).fill(0);
  for (const image of places) valuesOf(map, image).forEach((value, channel) => (sums[channel] += value));
  return sums.map((sum) => sum / places.length);
}

/** A channel gate as bars, in one order for all images, and its mean over the images as a line. */
function channelPanel(map, image, name) {
  if (!map) return null;
  const count = map.shape[0];
  const values = valuesOf(map, image);
  map.means ??= meansOf(map);
  const path = (heights) => heights.map((height, channel) => `V${height.toFixed(1)}H${channel + 1}`).join("");
  const bars = path(Array.from(values, (value) => 255 - value));
  const means = path(map.means.map((mean) => 255 - mean));
  const start = 255 - map.means[0];
  const panel = make("figure", { className: "channels" });
  panel.innerHTML = `<svg role="img" viewBox="0 0 ${count} 255" preserveAspectRatio="none">
    <path class="bars" d="M0 255${bars}V255Z"/><path class="means" d="M0 ${start}${means}"/></svg>`;
  panel.firstChild.ariaLabel = name;
  const digits = map.low < 0 || map.high > 1 ? 2 : 0; // a gate of a network of one's own
  const range = [map.low, map.high].map((value) => value.toFixed(digits)).join("–");
  panel.append(make("figcaption", {}, `${reduced(map, " channels")}, ${range}`));
  return panel;
}

// The list of images

function makeCard(image) {
  const truth = classes[images.label[image]];
  const columns = networks.map((network) => {
    const right = isRight(network, image);
    const text = `${classes[predicted(network, image)]} ${percent(confidence(network, image))}`;
    const slot = make("span", { className: "slot" });
    const loss = `loss ${network.loss[image].toFixed(2)}`;
    const lines = [make("span", {}, text), make("span", {}, loss)];
    return make("span", { className: "column" }, slot, nameOf(network), verdict(right), ...lines);
  });
  const original = make(
    "span",
    { className: "column" },
    picture(image, 0, null, nameOfImage(image)),
    make("span", { className: "name" }, `image ${images.number[image]}`),
    make("strong", {}, truth),
  );
  const card = make("button", { type: "button", className: "card" }, original, ...columns);
  card.addEventListener("click", () => enlarge(shown.indexOf(image)));
  return make("li", {}, card);
}

const cards = places.map(makeCard);
const cardAt = (place) => cards[shown[place]]?.firstChild;

/** Put the chosen map into every card. */
function drawCards() {
  const name = form.elements.map.value;
  places.forEach((image) => {
    const slots = cards[image].querySelectorAll(".slot");
    networks.forEach((network, column) => {
      const map = name ? network.blocks.find((block) => block.name === name)?.spatial : network.cam;
      const label = `${network.name}: ${name ? `spatial gate of ${name}` : "Grad-CAM"}`;
      slots[column].replaceChildren(map ? picture(image, 64, map, label) : noMap("no such gate"));
    });
  });
}

function filter() {
  const chosen = Object.fromEntries(new FormData(form));
  const judge = networks[chosen.network ?? 0];
  const [relation, ...pair] = (chosen.pair ?? "").split(" ");
  const [one, other] = pair.map((number) => networks[number]);
  const relations = {
    "": () => true,
    any: (image) => networks.some((network) => predicted(network, image) !== predicted(networks[0], image)),
    differ: (image) => predicted(one, image) !== predicted(other, image),
    better: (image) => isRight(one, image) && !isRight(other, image),
  };
  shown = places.filter(
    (image) =>
      (chosen.class === "" || images.label[image] === Number(chosen.class)) &&
      (chosen.result === "" || isRight(judge, image) === (chosen.result === "right")) &&
      Number(inPercent(confidence(judge, image))) >= Number(chosen.from) && // as it is shown
      Number(inPercent(confidence(judge, image))) <= Number(chosen.to || 100) &&
      relations[relation](image),
  );
  const sign = { test: 0, highest: -1, lowest: 1 }[chosen.order];
  shown.sort((one, other) => sign * (judge.loss[one] - judge.loss[other]) || one - other);
  list.replaceChildren(...shown.map((image) => cards[image]));
  const count = `${shown.length} of ${places.length} images`;
  form.elements.count.value = shown.length === 0 ? "no images match the filters" : count;
}

/** Arrow keys move from card to card, as they are laid out. */
list.addEventListener("keydown", (event) => {
  const place = shown.findIndex((_, place) => cardAt(place) === document.activeElement);
  const top = (place) => cardAt(place).offsetTop;
  const columns = Math.max(1, shown.filter((_, place) => top(place) === top(0)).length);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (place < 0 || step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  cardAt(place + step)?.focus();
});

// The enlarged image

function enlarge(place) {
  current = (place + shown.length) % shown.length;
  const image = shown[current];
  const truth = classes[images.label[image]];
  dialog.querySelector("h2").textContent = `Test image ${images.number[image]}: ${truth}`;
  dialog.querySelector("output").value = `${current + 1} of ${shown.length}`;
  const predictions = networks.map((network) => {
    const top = network.top[image].map(([label, value]) => `${classes[label]} ${percent(value)}`).join(", ");
    const known = `true class ${percent(Math.exp(-network.loss[image]))}, loss ${network.loss[image].toFixed(3)}`;
    const lines = [make("p", {}, top), make("p", {}, known)];
    return make("div", {}, make("h3", {}, network.name), verdict(isRight(network, image)), ...lines);
  });
  const cams = networks.map((network) =>
    make("div", {}, nameOf(network), spatialPanel(network.cam, image, `${network.name}: Grad-CAM`)),
  );
  const names = new Set(networks.flatMap((network) => network.blocks.map((block) => block.name)));
  const blocks = [...names].map((name) => {
    const found = networks.map((network) => network.blocks.find((block) => block.name === name));
    const empty = found.some((block) => block?.spatial) ? noMap("no spatial gate") : null;
    const cells = found.map((block, number) => {
      const network = networks[number];
      if (!block) return make("div", {}, nameOf(network), noMap("no attention here"));
      const label = `${network.name}, ${name}`;
      const spatial = spatialPanel(block.spatial, image, `${label}: spatial gate`) ?? empty?.cloneNode(true) ?? null;
      const channel = channelPanel(block.channel, image, `${label}: channel gate`);
      const note = block.note ? make("p", {}, block.note) : null;
      return make("div", {}, nameOf(network), note, spatial, channel);
    });
    return make("section", {}, make("h3", {}, name), make("div", { className: "networks" }, ...cells));
  });
  dialog.querySelector(".original").replaceChildren(picture(image, 0, null, nameOfImage(image)));
  dialog.querySelector(".predictions").replaceChildren(...predictions);
  dialog.querySelector(".maps").replaceChildren(
    make("section", {}, make("h3", {}, "Grad-CAM"), make("div", { className: "networks" }, ...cams)),
    ...blocks,
  );
  if (!dialog.open) dialog.showModal();
}

dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  enlarge(current + step);
});
dialog.addEventListener("click", ({ target, clientX: x, clientY: y }) => {
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  // The space around it; a key's click has no place.
  if (target === dialog && (x < left || x > right || y < top || y > bottom)) dialog.close();
});
dialog.addEventListener("close", () => cardAt(current).focus());
document.getElementById("previous").addEventListener("click", () => enlarge(current - 1));
document.getElementById("next").addEventListener("click", () => enlarge(current + 1));
document.getElementById("close").addEventListener("click", () => dialog.close());

// The filters

function addOptions(name, options) {
  for (const [value, text] of options) form.elements[name].append(make("option", { value }, text));
}

const spatial = networks.flatMap((network) => network.blocks.filter((block) => block.spatial));
const spatialNames = [...new Set(spatial.map((block) => block.name))];
addOptions("class", classes.map((name, label) => [label, name]));
addOptions("map", spatialNames.map((name) => [name, `spatial gate of ${name}`]));
if (networks.length > 1) {
  addOptions("network", networks.map((network, number) => [number, network.name]));
  if (networks.length > 2) addOptions("pair", [["any", "any two differ"]]);
  networks.forEach((one, i) =>
    networks.slice(i + 1).forEach((other, offset) => {
      const j = i + 1 + offset;
      addOptions("pair", [
        [`differ ${i} ${j}`, `${one.name} and ${other.name} differ`],
        [`better ${i} ${j}`, `${one.name} right, ${other.name} wrong`],
        [`better ${j} ${i}`, `${other.name} right, ${one.name} wrong`],
      ]);
    }),
  );
}
document.getElementById("networks").append(
  ...networks.map((network) => {
    const right = places.filter((image) => isRight(network, image)).length;
    const text = `: ${network.description}; ${right} of these ${places.length} images right`;
    return make("li", {}, make("strong", {}, network.name), text);
  }),
);
const colour = (value) => `rgb(${colours.subarray(4 * value, 4 * value + 3).join(" ")})`;
const style = document.documentElement.style;
style.setProperty("--colours", Array.from({ length: 16 }, (_, stop) => colour(17 * stop)).join(","));
style.setProperty("--bars", colour(120));
style.setProperty("--count", networks.length);
form.addEventListener("input", (event) => (event.target.name === "map" ? drawCards() : filter()));
document.getElementById("all").addEventListener("click", () => {
  form.reset();
  drawCards();
  filter();
});
form.addEventListener("submit", (event) => event.preventDefault());
drawCards();
filter();
