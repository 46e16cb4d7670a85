// The page: an image or a drawn digit in, the answers and times of all networks of demo.json out.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { inputOf, makeOpaque, median, pictureOf, seen, softmax } from "./image.mjs";

const LINES = 5; // classes shown of each network
const ROUNDS = 25; // of the timing, fewer where they take longer than
const PATIENCE = 1500; // milliseconds
const LARGEST = 2048; // pixels a side; larger photographs are made smaller by the browser first

const find = (id) => document.getElementById(id);
const breathe = () => new Promise((resolve) => setTimeout(resolve));
let demo, networks, latest = 0;

function say(text, wrong = false) {
  find("status").textContent = text;
  find("status").classList.toggle("wrong", wrong);
}

const short = (count) =>
  count >= 1e9 ? `${(count / 1e9).toFixed(2)} G` : count >= 1e6 ? `${(count / 1e6).toFixed(2)} M` : `${Math.round(count / 1e3)} k`;

function element(tag, text = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

async function start() {
  if (location.protocol === "file:") return;
  say("Loading the networks…");
  demo = await (await fetch("demo.json")).json();
  document.title = demo.title;
  find("title").textContent = demo.title;
  find("about").textContent = demo.about;
  find("pixels").textContent = `${demo.image.size}\u00a0×\u00a0${demo.image.size} pixels${demo.image.grey ? ", grey" : ""}`;
  ort.env.wasm.numThreads = 1; // more would need headers that isolate the page
  ort.env.wasm.wasmPaths = { wasm: new URL("ort/ort-wasm-simd-threaded.wasm", location.href).href };
  networks = [];
  for (const model of demo.models) {
    const session = await ort.InferenceSession.create(model.file, { executionProviders: ["wasm"] });
    networks.push({ ...model, session, view: viewOf(model) });
  }
  prepareInput();
  document.querySelector("main").hidden = false;
  say("");
  document.body.dataset.ready = "yes";
}

function viewOf(model) {
  const view = find("model").content.firstElementChild.cloneNode(true);
  view.querySelector("h2").textContent = model.name;
  const facts = [`${short(model.parameters)} parameters`, `${short(model.macs)} MACs`];
  facts.push(`${(model.bytes / 1e6).toFixed(2)} MB`);
  view.querySelector(".facts").replaceChildren(...facts.map((fact) => element("span", fact)));
  find("models").append(view);
  return view;
}

// ------------------------------------------------------------------------------------------------- what is shown

function clearAnswers() {
  latest++;
  delete document.body.dataset.answer;
  for (const { view } of networks) {
    view.querySelector(".answer strong").textContent = "–";
    view.querySelector(".share").textContent = "";
    view.querySelector(".bars").replaceChildren();
    view.querySelector(".time strong").textContent = "–";
    view.querySelector(".gain").textContent = "";
  }
  say("");
  find("seen").getContext("2d").clearRect(0, 0, find("seen").width, find("seen").height);
  find("note").textContent = demo.draw ? "Draw a digit, or choose an image of one." : "Drop or choose an image.";
}

function showSeen(picture) {
  const canvas = find("seen");
  canvas.width = picture.width;
  canvas.height = picture.height;
  const image = new ImageData(picture.width, picture.height);
  for (let i = 0; i < picture.width * picture.height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = picture.planes[c % picture.planes.length][i];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function showAnswer({ view }, shares) {
  const order = shares.map((share, index) => ({ share, index })).sort((a, b) => b.share - a.share);
  const best = demo.classes[order[0].index];
  const answer = view.querySelector(".answer");
  answer.classList.toggle("long", best.length > 6);
  answer.querySelector("strong").textContent = best;
  answer.querySelector(".share").textContent = `${(100 * order[0].share).toFixed(1)}%`;
  const lines = order.slice(0, LINES).map(({ share, index }) => {
    const [line, track, bar] = ["li", "i", "b"].map((tag) => element(tag));
    bar.style.width = `${100 * share}%`;
    track.append(bar);
    line.append(element("span", demo.classes[index]), element("span", `${(100 * share).toFixed(1)}%`), track);
    return line;
  });
  view.querySelector(".bars").replaceChildren(...lines);
  return `${best}, ${(100 * order[0].share).toFixed(0)} percent`;
}

function showTimes(times) {
  const middles = times.map(median);
  networks.forEach(({ view }, i) => {
    view.querySelector(".time strong").textContent = `${middles[i].toFixed(middles[i] < 10 ? 2 : 1)} ms`;
    view.querySelector(".gain").textContent = i ? `${(middles[0] / middles[i]).toFixed(2)}× as fast` : "for one image";
  });
  find("note").textContent =
    `Median of ${times[0].length} runs in turn, one image, one thread of WebAssembly in this browser. ${demo.note}`;
}

// ------------------------------------------------------------------------------------------------- what is computed

async function classify(picture) {
  const mine = ++latest;
  const shown = seen(picture, demo.image);
  if (!shown) {
    clearAnswers();
    return say("There is nothing to see in this image.");
  }
  showSeen(shown);
  const { size } = demo.image;
  const feeds = { images: new ort.Tensor("float32", inputOf(shown, demo.image), [1, 3, size, size]) };
  const spoken = [];
  for (const network of networks) {
    const { logits } = await network.session.run(feeds);
    if (mine !== latest) return; // something newer is to be looked at
    network.answer = softmax(logits.data);
    spoken.push(`${network.name}: ${showAnswer(network, network.answer)}`);
  }
  const times = networks.map(() => []);
  const begun = performance.now();
  for (let round = 0; round < ROUNDS && (!round || performance.now() - begun < PATIENCE); round++) {
    for (const [i, network] of networks.entries()) {
      const started = performance.now();
      await network.session.run(feeds);
      times[i].push(performance.now() - started);
    }
    await breathe();
    if (mine !== latest) return;
  }
  showTimes(times);
  find("spoken").textContent = `${spoken.join(". ")}.`;
  document.body.dataset.answer = networks.map(({ answer }) => answer.indexOf(Math.max(...answer))).join(" ");
}

async function lookAt(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const ratio = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
    const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * ratio)));
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    makeOpaque(pixels.data);
    context.putImageData(pixels, 0, 0);
    if (demo.draw) {
      const pad = find("pad").getContext("2d");
      pad.fillRect(0, 0, 280, 280);
      const fit = 280 / Math.max(width, height);
      pad.drawImage(canvas, (280 - fit * width) / 2, (280 - fit * height) / 2, fit * width, fit * height);
    } else {
      URL.revokeObjectURL(find("shown").src);
      find("shown").src = URL.createObjectURL(file);
      find("shown").alt = file.name;
      find("shown").hidden = false;
      find("hint").textContent = "Drop another image here";
    }
    say("");
    await classify(pictureOf(pixels.data, width, height, demo.image.grey));
  } catch (error) {
    say(`${file.name} cannot be read as an image (${error.message}).`, true);
  }
}

// ------------------------------------------------------------------------------------------------- what people do

function prepareInput() {
  find("input-title").textContent = demo.draw ? "Draw a digit" : "Show it an image";
  find(demo.draw ? "pad" : "drop").hidden = false;
  find("clear").hidden = !demo.draw;
  find("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) lookAt(target.files[0]);
    target.value = ""; // the same file may be chosen again
  });
  for (const kind of ["dragover", "dragleave", "drop"])
    addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) lookAt(event.dataTransfer.files[0]);
    });
  if (demo.draw) preparePad();
  clearAnswers();
}

function preparePad() {
  const pad = find("pad");
  const context = pad.getContext("2d", { willReadFrequently: true });
  const empty = () => {
    context.fillStyle = "#000";
    context.fillRect(0, 0, pad.width, pad.height);
    clearAnswers();
  };
  let drawing = false;
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    return [((event.clientX - box.left) * pad.width) / box.width, ((event.clientY - box.top) * pad.height) / box.height];
  };
  pad.addEventListener("pointerdown", (event) => {
    drawing = true;
    pad.setPointerCapture(event.pointerId);
    Object.assign(context, { strokeStyle: "#fff", lineWidth: 26, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...place(event));
    context.lineTo(...place(event));
    context.stroke();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!drawing) return;
    context.lineTo(...place(event));
    context.stroke();
  });
  for (const kind of ["pointerup", "pointercancel"])
    pad.addEventListener(kind, () => {
      if (!drawing) return;
      drawing = false;
      const { data } = context.getImageData(0, 0, pad.width, pad.height);
      classify(pictureOf(data, pad.width, pad.height, true));
    });
  find("clear").addEventListener("click", empty);
  empty();
}

start().catch((error) => say(`The networks cannot be loaded (${error.message}).`, true));
