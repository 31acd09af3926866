// Under GMFlow Inspector: the mean as a picture, and the components of the pixel under the pointer.
// The numbers are those of a file beside the preview (gmflow_core/pixels.py). Nothing here is saved or sent.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const HEIGHT = 206;
const MARGIN = 20; // what the page leaves around a widget, above and below together
const ROWS = 8;
const ROW = 17; // pixels
const WIDTH = 470; // of the node, at least: what the longest line takes
const panels = new WeakMap(); // node -> its panel

app.registerExtension({
  name: "gmflow.inspector",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "GMFlowInspector") return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      before?.apply(this, arguments);
      const found = message?.gmflow_pixels?.[0];
      if (found) show(this, found);
    };
  },
  loadedGraphNode(node) {
    if (node.comfyClass !== "GMFlowInspector") return;
    setTimeout(() => { // of a tab that is opened again; the page gives its outputs back after its nodes
      const found = app.nodeOutputs?.[node.id]?.gmflow_pixels?.[0];
      if (found && !panels.has(node) && node.graph) show(node, found);
    }, 500);
  },
});

async function show(node, text) { // a file's name, or why there is none
  const panel = panels.get(node) ?? addPanel(node);
  const latest = (panel.latest = {}); // of several runs the last one is shown, whichever answers first
  const named = text.endsWith(".safetensors");
  const data = named ? await load(text).catch((error) => console.warn("GMFlow Inspector:", error)) : null;
  if (panel.latest !== latest) return;
  draw(panel, data, named ? "Run again to see the components of a pixel." : text);
  app.graph?.setDirtyCanvas?.(true, true); // the page gives a widget its place when it draws
}

// ---- data ---------------------------------------------------------------------------------------

async function load(filename) {
  const query = new URLSearchParams({ filename, type: "temp", subfolder: "" });
  const answer = await api.fetchApi(`/view?${query}`);
  if (!answer.ok) return null; // a preview of an earlier day
  return parse(await answer.arrayBuffer());
}

// A safetensors file: the length of a JSON header, the header, the tensors. Anybody may have written it: shapes must
// fit the lengths, and what goes into styles are numbers.
function parse(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const shape = header.means.shape;
  if (shape.length !== 4 || !shape.every((n) => Number.isInteger(n) && n > 0)) throw new Error(`means of shape ${shape}`);
  const [height, width, count, channels] = shape, pixels = height * width;
  const values = (name, size) => {
    const { dtype, data_offsets: [start, end] } = header[name];
    const bytes = buffer.slice(8 + length + start, 8 + length + end);
    const found = dtype === "F16" ? Float32Array.from(new Uint16Array(bytes), half) : new Uint8Array(bytes);
    if (found.length !== size) throw new Error(`${name} holds ${found.length} values, not ${size}`);
    return found;
  };
  const said = JSON.parse(header.__metadata__.gmflow_pixels);
  return {
    height, width, count, channels, title: String(said.title), parts: String(said.parts),
    components: Number(said.components), std: Number(said.std), bits: Number(said.bits),
    colours: Array.from({ length: count }, (_, k) => [0, 1, 2].map((c) => byte(said.colours[k][c]))),
    weights: values("weights", pixels * count), means: values("means", pixels * count * channels),
    entropy: values("entropy", pixels), rgb: values("rgb", 3 * pixels * (1 + count)),
  };
}

function byte(value) {
  const number = Math.round(Number(value));
  return Number.isFinite(number) ? Math.max(0, Math.min(255, number)) : 0;
}

function half(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? Infinity : (1 + fraction / 1024) * 2 ** (exponent - 15);
  return bits & 0x8000 ? -size : size;
}

// One pixel, heaviest component first.
function mixtureAt(data, x, y) {
  const at = y * data.width + x;
  const parts = [];
  for (let k = 0; k < data.count; k++) {
    const mean = (at * data.count + k) * data.channels, rgb = 3 * (at * (1 + data.count) + 1 + k);
    parts.push({
      number: k + 1, weight: data.weights[at * data.count + k], colour: `rgb(${data.colours[k].join()})`,
      look: `rgb(${data.rgb.slice(rgb, rgb + 3).join()})`,
      mean: Array.from(data.means.slice(mean, mean + data.channels), (v) => v.toFixed(2)).join("  "),
    });
  }
  parts.sort((a, b) => b.weight - a.weight);
  return { parts, entropy: data.entropy[at] };
}

// ---- the widget ---------------------------------------------------------------------------------

function make(tag, style, parent) {
  const element = document.createElement(tag);
  Object.assign(element.style, style);
  parent?.append(element);
  return element;
}

function addPanel(node) {
  const root = make("div", {
    display: "flex", gap: "10px", padding: "6px", boxSizing: "border-box", width: "100%", height: "100%", minHeight: `${HEIGHT}px`, overflow: "hidden",
    background: "var(--comfy-input-bg, #222)", color: "var(--input-text, #ddd)", borderRadius: "6px", font: "12px/18px sans-serif",
  });
  const frame = make("div", { position: "relative", flex: "none", cursor: "crosshair", alignSelf: "flex-start" }, root);
  const canvas = make("canvas", { display: "block", imageRendering: "pixelated" }, frame);
  const marker = (colour) => make("div", { position: "absolute", boxSizing: "border-box", border: `1px solid ${colour}`, outline: "1px solid #000", pointerEvents: "none" }, frame);
  const kept = marker("#fd0"), box = marker("#fff");
  const text = make("div", { flex: "1", minWidth: "0", overflow: "hidden" }, root);
  const panel = { node, frame, canvas, kept, box, text, data: null };
  frame.addEventListener("pointermove", (event) => point(panel, event));
  frame.addEventListener("pointerleave", () => panel.data && describe(panel, ...keptPixel(panel)));
  // Not at "click": the page has taken its picture for undo by then.
  frame.addEventListener("pointerdown", (event) => event.button === 0 && keep(panel));
  const widget = node.addDOMWidget("gmflow_pixels", "gmflow_pixels", root, {
    serialize: false, hideOnZoom: false, hideInPanel: true, getMinHeight: () => HEIGHT + MARGIN, getMaxHeight: () => HEIGHT + MARGIN,
    getValue: () => undefined, setValue: () => {},
  });
  widget.serialize = false; // no value in a workflow
  const preview = node.widgets.findIndex(({ name }) => name === "$$canvas-image-preview"); // it takes the rest of the node
  if (preview >= 0) node.widgets.splice(preview, 0, node.widgets.pop());
  const least = node.computeSize(); // with some room for the preview; no more, for there may be nodes beneath
  node.setSize([Math.max(node.size[0], least[0], WIDTH), Math.max(node.size[1], least[1])]);
  panels.set(node, panel);
  return panel;
}

function draw(panel, data, note) {
  panel.data = data;
  panel.frame.style.display = data ? "" : "none";
  if (!data) {
    panel.text.textContent = note;
    return;
  }
  const { width, height, count, rgb } = data, space = HEIGHT - 12;
  const scale = Math.min(space / height, space / width);
  Object.assign(panel.canvas, { width, height });
  Object.assign(panel.canvas.style, { width: `${width * scale}px`, height: `${height * scale}px` });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set([...rgb.slice(3 * i * (1 + count), 3 * i * (1 + count) + 3), 255], 4 * i);
  panel.canvas.getContext("2d").putImageData(image, 0, 0);
  describe(panel, ...keptPixel(panel));
}

// The pixel of the view "pixel", as the node's inputs say.
function keptPixel({ node, data }) {
  const size = [data.width, data.height];
  const chosen = ["pixel_x", "pixel_y"].map((name) => node.widgets?.find((widget) => widget.name === name)?.value ?? -1);
  return chosen.map((value, axis) => (value < 0 ? Math.floor(size[axis] / 2) : Math.min(value, size[axis] - 1)));
}

function point(panel, event) {
  if (!panel.data) return;
  const { width, height } = panel.data, area = panel.canvas.getBoundingClientRect();
  const cell = (at, start, size, count) => Math.max(0, Math.min(count - 1, Math.floor(((at - start) / size) * count)));
  describe(panel, cell(event.clientX, area.left, area.width, width), cell(event.clientY, area.top, area.height, height));
}

// A click makes it the pixel of the view "pixel".
function keep(panel) {
  for (const [name, value] of [["pixel_x", panel.x], ["pixel_y", panel.y]]) {
    const widget = panel.node.widgets?.find((each) => each.name === name);
    if (!widget) continue;
    widget.value = value;
    widget.callback?.(value);
  }
  describe(panel, panel.x, panel.y);
  app.graph?.setDirtyCanvas?.(true, true);
}

function place(marker, panel, x, y) {
  const unit = [parseFloat(panel.canvas.style.width) / panel.data.width, parseFloat(panel.canvas.style.height) / panel.data.height];
  const side = unit.map((u) => Math.max(u, 6));
  Object.assign(marker.style, {
    left: `${(x + 0.5) * unit[0] - side[0] / 2}px`, top: `${(y + 0.5) * unit[1] - side[1] / 2}px`, width: `${side[0]}px`, height: `${side[1]}px`,
  });
}

function describe(panel, x, y) {
  const { data, text } = panel, [keptX, keptY] = keptPixel(panel);
  Object.assign(panel, { x, y });
  const { parts, entropy } = mixtureAt(data, x, y);
  place(panel.kept, panel, keptX, keptY);
  place(panel.box, panel, x, y);
  panel.kept.style.display = x === keptX && y === keptY ? "none" : "";
  text.replaceChildren();
  addLine(text, 1, `${data.title}, x ${x}, y ${y}`);
  const many = data.components > 1 ? `${data.components} components` : "1 component";
  addLine(text, 0.65, `${entropy.toFixed(2)} bits in ${many}, std ${data.std.toPrecision(2)}`).title =
    `Entropy of the network's components, of at most ${data.bits.toFixed(2)} bits. Below: ${data.parts}.`;
  const shown = parts.slice(0, ROWS).filter(({ weight }) => weight >= 0.0005);
  for (const part of shown) addRow(text, part, parts[0].weight);
  const rest = 1 - shown.reduce((sum, part) => sum + part.weight, 0);
  if (rest > 0.0005) addLine(text, 0.65, `others: ${(100 * rest).toFixed(1)} %`);
}

function addLine(parent, opacity, words) {
  const line = make("div", { opacity, whiteSpace: "nowrap", overflow: "hidden", textOverflow: "ellipsis" }, parent);
  line.textContent = words;
  return line;
}

function addRow(parent, { number, weight, colour, look, mean }, largest) {
  const row = make("div", { display: "flex", alignItems: "center", gap: "6px", height: `${ROW}px` }, parent);
  row.title = `mean of x_0: ${mean}`;
  make("span", { width: "16px", textAlign: "right", opacity: 0.65 }, row).textContent = number;
  make("span", { width: "5px", height: "14px", background: colour }, row);
  make("span", { width: "26px", height: "14px", background: look, flex: "none", borderRadius: "2px", boxShadow: "0 0 0 1px #8886" }, row);
  const track = make("span", { flex: "1", height: "10px" }, row);
  make("span", { display: "block", height: "100%", width: `${100 * (weight / (largest || 1))}%`, background: colour, borderRadius: "2px" }, track);
  make("span", { width: "50px", textAlign: "right" }, row).textContent = `${(100 * weight).toFixed(1)} %`;
}
