// The views of a text. inspector(root, data) fills the markup of inspect.html in `root` with the results of
// gpt2.inspect, and may be called again with other data. All text is set as textContent, so it is never parsed as HTML.

const KIND_CLASS = { previous: "c0", first: "c1", word: "c2", same: "c3", induction: "c5", itself: "c6", spreads: "spreads" };
const MOST_BITS = 10; // the surprise that is shown in the strongest colour
const LENS_COLUMNS = 128; // maximum number of columns in the logit lens, around the selected token
const SMALL = 44; // maximum number of rows in a small map
const AXIS_LABELS = 24; // maximum number of tokens to label along the axes of a map
const SHORT = 40; // maximum number of tokens in a short text, which is shown in larger type, with all tokens below the arcs

let redraw = () => {};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

function inspector(root, data) {
  const text = reader(data);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  root.classList.toggle("short", text.T <= SHORT);
  const state = { token: text.T > 1 ? text.mostSurprising : 0, layer: 0, head: 0, order: "" };
  [state.layer, state.head] = text.clearestHead;
  const views = [titleView, textView, mapsView, headView, arcsView, lensView, sizesView, neighboursView];
  const updates = views.map((view) => view(text, part, choose));
  function choose(change) {
    Object.assign(state, change);
    for (const update of updates) update(state);
  }
  redraw = () => choose({});
  choose({});
  return choose;
}

// ---------------------------------------------------------------------------------------------------------------------
// The data
// ---------------------------------------------------------------------------------------------------------------------

// Converts the data for the views. Tokens t, layers and heads are counted from 0; head H is the mean of a layer's heads.
function reader(data) {
  const T = data.tokens.length, { layers: L, heads: H } = data.model, attention = data.attention;
  const choices = { ids: unpack(data.choices.ids), p: unpack(data.choices.p), count: data.choices.ids.shape[1] };
  const lens = { ids: unpack(data.lens.ids), p: unpack(data.lens.p) };
  const weights = unpack(attention.weights), triangle = (T * (T + 1)) / 2;
  const keys = attention.exact ? null : unpack(attention.keys), overview = attention.exact ? null : unpack(attention.overview);
  const links = attention.exact ? 0 : attention.keys.shape[3], grid = attention.grid;
  const label = (id) => data.labels[id];
  const shown = (s) => s.replaceAll(" ", "\u2423");
  const bits = data.surprise.map((value) => value ?? -1);
  const heads = attention.heads.flatMap((row, layer) => row.map((head, i) => ({ ...head, layer, head: i })));
  const clearest = heads.reduce((best, head) => (head.score > best.score ? head : best), heads[0]);
  return {
    data, T, L, H, label, heads,
    exact: attention.exact,
    mostSurprising: bits.indexOf(Math.max(...bits)),
    clearestHead: [clearest.layer, clearest.head],
    raw: (t) => label(data.tokens[t]),
    name: (t) => `\u201c${shown(label(data.tokens[t]))}\u201d`,
    id: (id) => shown(label(id)),
    // The most probable tokens at position t, predicted from the tokens before it: [[id, p]].
    choices: (t) => Array.from({ length: t ? choices.count : 0 }, (_, i) => {
      const at = (t - 1) * choices.count + i;
      return [choices.ids[at], choices.p[at]];
    }),
    lens: (layer, t) => [lens.ids[layer * T + t], lens.p[layer * T + t]],
    kind: (layer, head) => (head === H ? "mean" : attention.heads[layer][head].kind),
    measures: (layer, head) => attention.heads[layer][head],
    // The keys that query t attends to, strongest first: [[key, weight]]. For a long text, only the strongest.
    links(layer, head, t) {
      const at = layer * (H + 1) + head;
      const pairs = attention.exact
        ? Array.from({ length: t + 1 }, (_, key) => [key, weights[at * triangle + (t * (t + 1)) / 2 + key]])
        : Array.from({ length: links }, (_, i) => {
            const place = (at * T + t) * links + i;
            return [keys[place], weights[place] / 255];
          }).filter(([key, weight]) => weight > 0 && key <= t);
      return pairs.sort((a, b) => b[1] - a[1]);
    },
    // The map of a head: its number of rows, and the weight at a row and column.
    map(layer, head) {
      const at = layer * (H + 1) + head;
      if (!attention.exact) return { size: grid, weight: (i, j) => overview[(at * grid + i) * grid + j] / 255 };
      return { size: T, weight: (i, j) => (j > i ? 0 : weights[at * triangle + (i * (i + 1)) / 2 + j]) };
    },
    // The tokens in a row or column of a map: [first, last].
    group: (i) => (attention.exact ? [i, i] : [Math.floor((i * T) / grid), Math.floor(((i + 1) * T) / grid) - 1]),
  };
}

function unpack(array) {
  const bytes = Uint8Array.from(atob(array.base64), (character) => character.charCodeAt(0));
  return new { float32: Float32Array, int32: Int32Array, uint16: Uint16Array, uint8: Uint8Array }[array.dtype](bytes.buffer);
}

const number = (value) => value.toLocaleString("en");
const percent = (p) => {
  const value = 100 * p;
  return value > 0 && value < 0.05 ? "< 0.1%" : `${value.toFixed(value >= 9.95 || value === 0 ? 0 : 1)}%`;
};

// ---------------------------------------------------------------------------------------------------------------------
// Elements
// ---------------------------------------------------------------------------------------------------------------------

// Creates an element with attributes, style variables (names that begin with --), listeners (on...) and children.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.startsWith("on")) element[name] = value;
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function drawn(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Makes the options of a list accessible by keyboard: the arrow keys move the focus from one option to another.
// steps  the number of options by which each key moves the focus.
function keyboard(list, options, steps, chosen) {
  list.onkeydown = (event) => {
    const at = options.indexOf(document.activeElement);
    const last = options.length - 1;
    const to = event.key === "Home" ? 0 : event.key === "End" ? last : at + (steps[event.key] ?? NaN);
    if (at < 0 || !(to >= 0 && to <= last)) return;
    event.preventDefault();
    chosen(to);
    options[to].focus();
  };
}

// Marks one of the options as selected.
function mark(options, at) {
  options.forEach((option, i) => {
    option.setAttribute("aria-selected", i === at);
    option.tabIndex = i === at || (at < 0 && i === 0) ? 0 : -1;
  });
}

// Scrolls a box so that an element in it is visible, without scrolling the page.
function show(box, element) {
  const outer = box.getBoundingClientRect(), inner = element.getBoundingClientRect();
  if (inner.left < outer.left || inner.right > outer.right)
    box.scrollLeft += inner.left - outer.left - (outer.width - inner.width) / 2;
  if (inner.top < outer.top || inner.bottom > outer.bottom)
    box.scrollTop += inner.top - outer.top - (outer.height - inner.height) / 2;
}

const mono = (text, kind = "") => make("span", { class: `mono ${kind}` }, text);

// Rows that consist of a name, a bar and a probability.
function bars(rows) {
  const most = Math.max(...rows.map(([, p]) => p), 1e-9);
  return make("div", { class: "bars" }, ...rows.flatMap(([name, p, actual]) => {
    const kind = actual ? "actual" : "";
    return [mono(name, kind), make("span", {}, make("i", { class: kind, "--p": p / most })),
            make("span", { class: `value ${kind}` }, percent(p))];
  }));
}

// ---------------------------------------------------------------------------------------------------------------------
// The text and what was expected
// ---------------------------------------------------------------------------------------------------------------------

function titleView(text, part) {
  const { data, T } = text, { model } = data;
  const line = data.text.replace(/\s+/g, " ").trim(), letters = [...line];
  const cut = letters.slice(0, 120).join(""), end = cut.lastIndexOf(" ");
  part("title").textContent = letters.length > 120 ? `${end > 80 ? cut.slice(0, end) : cut} \u2026` : line || "White space";
  part("about").textContent =
    `${model.name}: ${model.layers} layers with ${model.heads} attention heads each, embedding size ${model.width}, ` +
    `${number(model.parameters)} parameters. Layers, heads and tokens are counted from 1.`;
  const tile = (name, value, remark) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, remark)));
  const most = text.mostSurprising, bits = data.surprise[most];
  part("tiles").replaceChildren(
    tile("tokens", number(T), `of at most ${number(model.context)}, the model's context`),
    tile("bits per byte", data.bits_per_byte === null ? "-" : data.bits_per_byte.toFixed(2),
         T > 1 ? "mean surprise per byte of the text; uniform guessing gives 8" : "one token: nothing is predicted"),
    tile("most surprising", T > 1 ? text.name(most) : "-", T > 1 ? `token ${most + 1}, ${bits.toFixed(1)} bits` : ""),
  );
  const generated = T - data.prompt;
  part("notes").textContent = [
    ...(data.notes ?? []),
    generated ? `The model generated ${data.prompt ? `the last ${number(generated)} tokens` : "this text"} itself.` : "",
  ].filter(Boolean).join(" ");
  return () => {};
}

function textView(text, part, choose) {
  const list = part("text"), panel = part("expected");
  const options = Array.from({ length: text.T }, (_, t) => {
    const bits = text.data.surprise[t];
    return make("span", {
      class: `token${t ? "" : " first"}${t >= text.data.prompt ? " generated" : ""}`, role: "option", dir: "ltr",
      "--s": Math.min((bits ?? 0) / MOST_BITS, 1),
      "aria-label": `token ${t + 1}, ${text.name(t)}, ${bits === null ? "first" : `${bits.toFixed(1)} bits`}`,
      onclick: () => choose({ token: t }),
      onpointerenter: (event) => event.pointerType === "mouse" && panel.replaceChildren(...expected(text, t)),
    }, text.raw(t));
  });
  let state = null;
  list.onpointerleave = () => state && panel.replaceChildren(...expected(text, state.token));
  list.replaceChildren(...lines(text, options));
  keyboard(list, options, { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -20, ArrowDown: 20 }, (token) => choose({ token }));
  return (now) => {
    state = now;
    mark(options, state.token);
    show(list, options[state.token]);
    panel.replaceChildren(...expected(text, state.token));
  };
}

// The tokens, with a line break after each newline. The tokens of a word are grouped, so that lines wrap between words.
function lines(text, options) {
  const groups = [];
  let group = null;
  options.forEach((option, t) => {
    const raw = text.raw(t), before = t ? text.raw(t - 1) : " ";
    if (!group || /^[\s\u21b5]/.test(raw) || /[\s\u21b5]$/.test(before) || group.childElementCount === 24)
      groups.push((group = make("span", { class: "word", role: "presentation" })));
    group.append(option);
    if (raw.includes("\u21b5")) groups.push(make("br"));
  });
  return groups;
}

// What the model expected at token t.
function expected(text, t) {
  const { data } = text, title = make("h3", {}, `Token ${t + 1}: `, mono(text.name(t)));
  if (!t) return [title, make("p", {}, "The first token is not predicted, because there are no tokens before it.")];
  const p = 2 ** -data.surprise[t], own = data.tokens[t], rows = text.choices(t).map(([id, p]) => [text.id(id), p, id === own]);
  if (!rows.some(([, , actual]) => actual)) rows.push([text.id(own), p, true]);
  const first = data.rank[t] === 1 ? "It was the first choice" : `It was choice ${number(data.rank[t])}`;
  const about = make("div", {}, title, make("p", {}, `Surprise ${data.surprise[t].toFixed(2)} bits: the model gave it ` +
    `${percent(p)}. ${first} of ${number(data.model.vocabulary)} possible tokens.`));
  const tokens = make("div", {}, make("h4", {}, "Expected token"), bars(rows)), words = expectedWords(text, t);
  return words.likely ? [about, ...words.shown, tokens] : [about, tokens, ...words.shown];
}

// What the model expected instead of the word that contains token t; `likely` is whether it expected a word at all.
function expectedWords({ data, label }, t) {
  const [start, word] = Object.entries(data.words).find(([at, place]) => +at <= t && t < place.end) ?? [];
  if (!word) return { likely: false, shown: [] };
  const actual = data.tokens.slice(+start, word.end).map(label).join("").trim(), likely = word.begins >= 0.5;
  const rows = word.words.map(([name, p]) => [name, p, name === actual]);
  if (!rows.some(([, , same]) => same)) rows.push([actual, word.p, true]);
  const title = likely ? `Expected word (the text has \u201c${actual}\u201d)`
    : `Expected words where \u201c${actual}\u201d begins (all words together had only ${percent(word.begins)})`;
  return { likely, shown: [make("div", {}, make("h4", {}, title), bars(rows))] };
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention
// ---------------------------------------------------------------------------------------------------------------------

// Draws a map in the colour of the canvas: more attention is more opaque. Keys after the query have the colour of the rules.
function draw(canvas, map) {
  const { size, weight } = map, style = getComputedStyle(canvas);
  const rgb = (name) => {
    const hex = style.getPropertyValue(name).trim().replace("#", "");
    const full = hex.length === 3 ? [...hex].map((c) => c + c).join("") : hex;
    return [0, 2, 4].map((i) => parseInt(full.slice(i, i + 2), 16));
  };
  const kind = [...canvas.classList].find((name) => /^(c\d|spreads|mean)$/.test(name));
  const ink = rgb({ spreads: "--c7", mean: "--ink" }[kind] ?? `--${kind}`), ahead = rgb("--rule");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  for (let i = 0, at = 0; i < size; i++)
    for (let j = 0; j < size; j++, at += 4) {
      image.data.set(j > i ? ahead : ink, at);
      image.data[at + 3] = j > i ? 110 : 255 * Math.min(1, weight(i, j)) ** 0.6;
    }
  context.putImageData(image, 0, 0);
}

// A map with at most SMALL rows: each square shows the largest weight of a group, so that thin lines remain visible.
function small({ size, weight }) {
  const group = Math.ceil(size / SMALL), smaller = Math.ceil(size / group);
  return { size: smaller, weight(i, j) {
    let most = 0;
    for (let y = i * group; y < Math.min(size, (i + 1) * group); y++)
      for (let x = j * group; x < Math.min(size, (j + 1) * group); x++) most = Math.max(most, weight(y, x));
    return most;
  } };
}

const kindClass = (kind) => (kind === "mean" ? "mean" : KIND_CLASS[kind]);
const kindName = (text, kind) => (kind === "spreads" ? "no single pattern" : text.data.patterns[kind][0]);

function mapsView(text, part, choose) {
  const { L, H, data } = text, box = part("maps"), select = part("order"), kinds = Object.keys(data.patterns);
  const canvases = [];
  const maps = Array.from({ length: L * (H + 1) }, (_, i) => {
    const layer = Math.floor(i / (H + 1)), head = i % (H + 1), kind = text.kind(layer, head);
    const canvas = make("canvas", { class: kindClass(kind) });
    canvases.push([canvas, small(text.map(layer, head))]);
    const what = head === H ? `mean of the heads of layer ${layer + 1}` : `layer ${layer + 1}, head ${head + 1}: ${kindName(text, kind)}`;
    return make("button", { class: "map", type: "button", role: "option", title: what, "aria-label": what,
      onclick: () => choose({ layer, head }) }, canvas);
  });
  const at = (layer, head) => layer * (H + 1) + head;
  select.replaceChildren(make("option", { value: "" }, "by layer and head"),
    ...kinds.map((kind) => make("option", { value: kind }, `by attention to: ${data.patterns[kind][0]}`)),
    make("option", { value: "spreads" }, "by how far attention spreads"));
  select.value = "";
  select.onchange = () => choose({ order: select.value });
  part("kinds").replaceChildren(...[...kinds, "spreads"].map((kind) =>
    make("span", { class: KIND_CLASS[kind] }, kindName(text, kind))), make("span", { class: "mean" }, "mean over the heads"));
  part("maps-note").textContent = "The colour of a map shows the main pattern of its head on this text. " +
    (text.exact ? "" : `The text has more than 128 tokens, so each map is an overview of ${data.attention.grid} x ` +
      `${data.attention.grid} groups of tokens, and only the 8 largest weights of each token are kept, rounded to 1/255. `) +
    (text.T < 32 ? "A short text gives only a hint; a longer text is more reliable." : "");
  const marked = (order) => (head) => (order === "spreads" ? head.spread : (head[order]?.[0] ?? -1));
  let arranged = null, options = [];
  const arrange = (order) => {
    box.classList.toggle("sorted", order !== "");
    box.style.setProperty("--columns", H + 1);
    if (order === "") {
      const columns = Array.from({ length: H }, (_, head) => make("span", {}, `${head + 1}`));
      box.replaceChildren(make("span", {}, "Head"), ...columns, make("span", {}, "mean"),
        ...Array.from({ length: L }, (_, layer) =>
          [make("span", {}, `Layer ${layer + 1}`), ...maps.slice(at(layer, 0), at(layer + 1, 0))]).flat());
      options = maps;
    } else {
      const value = marked(order), sorted = [...text.heads].sort((a, b) => value(b) - value(a));
      options = sorted.map((head) => maps[at(head.layer, head.head)]);
      box.replaceChildren(...sorted.map((head, i) => make("div", {}, options[i], make("span", { class: "hint" },
        `${head.layer + 1}.${head.head + 1} `, value(head) < 0 ? "-" : order === "spreads" ? value(head).toFixed(1) : percent(value(head))))));
    }
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: order ? -1 : -H - 1, ArrowDown: order ? 1 : H + 1 };
    keyboard(box, options, steps, (i) => {
      const place = maps.indexOf(options[i]);
      choose({ layer: Math.floor(place / (H + 1)), head: place % (H + 1) });
    });
    arranged = order;
  };
  let scheme = null;
  return (state) => {
    if (arranged !== state.order) arrange(state.order);
    const now = getComputedStyle(box).getPropertyValue("--ink");
    if (scheme !== now) for (const [canvas, map] of canvases) draw(canvas, map);
    scheme = now;
    for (const map of maps) map.setAttribute("aria-selected", false);
    mark(options, options.indexOf(maps[at(state.layer, state.head)]));
  };
}

// Describes a head in words.
function description(text, layer, head) {
  if (head === text.H) return [make("p", {}, "The mean of the attention of all heads of this layer.")];
  const measured = text.measures(layer, head), kind = measured.kind;
  const dot = make("i", { class: `dot ${kindClass(kind)}` }), [id, share, even] = measured.most;
  const most = text.T < 2 ? "" : ` In the entire text, it prefers \u201c${text.id(id)}\u201d, which gets ${percent(share)} of its attention ` +
    `(${percent(even)} if attention were uniform).`;
  if (kind === "spreads")
    return [make("p", {}, dot, make("strong", {}, "No single pattern: "), `no pattern stands out on this text. The attention is ` +
      `spread over about ${measured.spread.toFixed(1)} tokens.${most}`)];
  const [part, chance, queries] = measured[kind], [name, what] = text.data.patterns[kind];
  return [make("p", {}, dot, make("strong", {}, `${name[0].toUpperCase()}${name.slice(1)}: `),
    `it looks at ${what}. ${percent(part)} of its attention goes there; it would be ${percent(chance)} if attention were ` +
    `uniform. Measured on ${number(queries)} token${queries === 1 ? "" : "s"} of this text.${most}`)];
}

function measureTable(text, layer, head) {
  const measured = text.measures(layer, head);
  const rows = Object.entries(text.data.patterns).map(([kind, [name]]) => make("tr", {}, make("th", { scope: "row" }, name),
    ...(measured[kind] ? [percent(measured[kind][0]), percent(measured[kind][1]), number(measured[kind][2])] : ["-", "-", "0"])
      .map((value) => make("td", {}, value))));
  const titles = ["looks at", "share", "uniform", "tokens"].map((title) => make("th", { scope: "col" }, title));
  return make("details", {}, make("summary", {}, "All measurements"), make("div", { class: "scroll" },
    make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows))));
}

function headView(text, part, choose) {
  const panel = part("head"), { T, H } = text;
  return (state) => {
    const { layer, head, token } = state, map = text.map(layer, head), kind = kindClass(text.kind(layer, head));
    const canvas = make("canvas", { class: kind, role: "img",
      "aria-label": "The enlarged map, which the sentences and arcs below describe." });
    const readout = make("p", { class: "readout" });
    const rest = () => { readout.textContent = "Point at the map to read a weight, or click it to select the token in that row."; };
    const cell = (event) => {
      const box = canvas.getBoundingClientRect();
      const along = (value, size) => Math.max(0, Math.min(map.size - 1, Math.floor((value / size) * map.size)));
      return [along(event.clientY - box.top, box.height), along(event.clientX - box.left, box.width)];
    };
    canvas.onpointermove = canvas.onpointerdown = (event) => {
      const [i, j] = cell(event), [query, lastQuery] = text.group(i), [key, lastKey] = text.group(j);
      const named = (a, b) => (a === b ? `${text.name(a)} (token ${a + 1})` : `tokens ${a + 1} to ${b + 1}`);
      readout.textContent = j > i ? `${named(key, lastKey)} comes later, so it is not visible.`
        : `${named(query, lastQuery)} \u2192 ${named(key, lastKey)}: ${percent(map.weight(i, j))}`;
    };
    canvas.onpointerleave = rest;
    canvas.onclick = (event) => choose({ token: text.group(cell(event)[0])[0] });
    rest();
    const axis = (kind, last) => make("div", { class: `axis ${kind}`, "aria-hidden": "true" },
      ...Array.from({ length: T <= AXIS_LABELS ? T : 0 }, (_, t) => mono(text.id(text.data.tokens[t]), t === last ? "on" : "")));
    panel.replaceChildren(
      make("h3", {}, `Layer ${layer + 1}, ${head === H ? "mean over the heads" : `head ${head + 1}`}`),
      ...description(text, layer, head),
      make("p", { class: "axes", "aria-hidden": "true" }, "\u2193 the token that looks, \u2192 what it looks at"),
      make("div", { class: "large" }, axis("across", -1), axis("down", token), canvas),
      make("div", { class: "legend" }, make("span", {}, "0%"), make("i", { class: `amounts ${kind}` }),
        make("span", {}, "100% of a row's attention")),
      readout, ...(head === H ? [] : [measureTable(text, layer, head)]));
    draw(canvas, map);
  };
}

function arcsView(text, part, choose) {
  const box = part("arcs"), svg = drawn("svg", { "aria-hidden": "true" });
  const options = Array.from({ length: text.T }, (_, t) =>
    make("span", { class: "token", role: "option", onclick: () => choose({ token: t }) }, text.id(text.data.tokens[t])));
  const strip = make("div", { role: "listbox", "aria-label": "The token that looks" }, svg, ...options);
  box.replaceChildren(strip);
  keyboard(strip, options, { ArrowLeft: -1, ArrowRight: 1 }, (token) => choose({ token }));
  part("arcs-note").textContent = text.T <= SHORT ? "" : "Tokens without an arc are omitted.";
  return (state) => {
    const { layer, head, token } = state, links = text.links(layer, head, token);
    const drawnLinks = links.filter(([, w]) => w >= 0.01).slice(0, 16), weight = new Map(drawnLinks);
    strip.className = `strip ${kindClass(text.kind(layer, head))}`;
    mark(options, token);
    const near = (t, reach) => Array.from({ length: 2 * reach + 1 }, (_, i) => t - reach + i);
    const kept = new Set([...near(token, 2), ...drawnLinks.flatMap(([key]) => near(key, 1))]);
    let before = -1;
    options.forEach((option, t) => {
      option.hidden = text.T > SHORT && !kept.has(t);
      if (option.hidden) return;
      option.classList.toggle("after-gap", t !== before + 1);
      option.style.setProperty("--s", weight.get(t) ?? 0);
      before = t;
    });
    const middle = (t) => options[t].offsetLeft + options[t].offsetWidth / 2, ground = 116;
    svg.replaceChildren(...drawnLinks.map(([key, w]) => {
      const [from, to] = [middle(token), middle(key)], height = Math.min(104, 18 + Math.abs(from - to) / 3);
      const path = key === token ? `M${from} ${ground}a7 7 0 1 1 .1 0`
        : `M${from} ${ground}C${from} ${ground - height * 1.3} ${to} ${ground - height * 1.3} ${to} ${ground}`;
      return drawn("path", { d: path, "stroke-width": 1 + 7 * w, opacity: 0.3 + 0.7 * w });
    }));
    show(box, options[token]);
    part("arcs-text").replaceChildren(...sentence(text, state, links));
  };
}

// A sentence about the tokens that a head looks at from the selected token.
function sentence(text, { layer, head, token }, links) {
  const who = head === text.H ? `the heads of layer ${layer + 1} together look` : `head ${head + 1} of layer ${layer + 1} looks`;
  const place = ([key, weight]) => `${key === token ? "itself" : `${text.name(key)} (token ${key + 1})`} ${percent(weight)}`;
  const begin = `From ${text.name(token)} (token ${token + 1}), ${who} `;
  if (!token) return [begin, "only at itself, since it is the first token."];
  const [first, ...rest] = links.filter(([, weight]) => weight >= 0.01).slice(0, 5);
  if (!first) return [begin, "at no token with a weight of 1% or more."];
  return [begin, "most at ", make("strong", {}, place(first)), rest.length ? `, then at ${rest.map(place).join(", ")}.` : "."];
}

// ---------------------------------------------------------------------------------------------------------------------
// Logit lens, residual stream, neighbours
// ---------------------------------------------------------------------------------------------------------------------

function lensView(text, part, choose) {
  const { T, L } = text, box = part("lens"), hint = part("lens-text");
  let first = -1, columns = [], last = null;
  const build = (token) => {
    const count = Math.min(T, LENS_COLUMNS);
    first = Math.max(0, Math.min(T - count, token - (count >> 1)));
    const all = Array.from({ length: count }, (_, i) => first + i);
    columns = all.map(() => []);
    const cell = (t, kind, content, attributes = {}) => {
      const made = make(kind === "head" ? "th" : "td", { ...attributes, onclick: () => choose({ token: t }) }, content);
      columns[t - first].push(made);
      return made;
    };
    const row = (name, cells) => make("tr", {}, make("th", { class: "row", scope: "row" }, name), ...cells);
    const names = Array.from({ length: L + 1 }, (_, i) => (i ? `layer ${i}` : "embedding"));
    const body = names.map((name, layer) => row(name, all.map((t) => {
      const [id, p] = text.lens(layer, t), final = text.lens(L, t)[0] === id;
      return cell(t, "cell", text.id(id), { class: `cell${final ? " final" : ""}`, "--s": p, title: `${percent(p)}` });
    })));
    const next = (t) => (t + 1 < T ? text.id(text.data.tokens[t + 1]) : "");
    box.replaceChildren(make("table", { class: "lens" },
      make("thead", {}, row("token", all.map((t) => cell(t, "head", text.id(text.data.tokens[t]), { scope: "col" })))),
      make("tbody", {}, ...body), make("tfoot", {}, row("next in the text", all.map((t) => cell(t, "cell", next(t)))))));
  };
  return ({ token }) => {
    if (first < 0 || token < first || token >= first + columns.length) build(token);
    columns.forEach((cells, i) => cells.forEach((cell) => cell.setAttribute("aria-selected", first + i === token)));
    if (T > LENS_COLUMNS || ![null, token].includes(last)) show(box, columns[token - first][0]); // else it starts at the left
    last = token;
    const [final] = text.lens(L, token);
    let since = L;
    while (since > 0 && text.lens(since - 1, token)[0] === final) since--;
    const says = (layer) => `\u201c${text.id(text.lens(layer, token)[0])}\u201d (${percent(text.lens(layer, token)[1])})`;
    const when = since === L ? `${L > 1 ? `Layer ${L - 1}` : "The embedding alone"} would predict ${says(L - 1)}.`
      : `It predicts this from ${since ? `layer ${since} on, with ${percent(text.lens(since, token)[1])} there` : "the embedding on, before any layer"}.`;
    hint.textContent = `After ${text.name(token)} (token ${token + 1}), the model predicts ${says(L)}. ${when}` +
      (T > LENS_COLUMNS ? ` The table shows the ${LENS_COLUMNS} of ${number(T)} tokens around the selected one.` : "");
  };
}

function sizesView(text, part) {
  const { T, L, data } = text, box = part("sizes");
  const kinds = [["stream", "c0", L + 1], ["attention", "c1", L], ["mlp", "c2", L]];
  const values = Object.fromEntries(kinds.map(([name]) => [name, unpack(data.sizes[name])]));
  const row = (name, layer) => values[name].subarray(layer * T, (layer + 1) * T);
  const median = (numbers) => [...numbers].sort((a, b) => a - b)[numbers.length >> 1];
  const usual = kinds.map(([name, , count]) => Array.from({ length: count }, (_, layer) => median(row(name, layer))));
  return ({ token }) => {
    const own = kinds.map(([name, , count]) => Array.from({ length: count }, (_, layer) => row(name, layer)[token]));
    const top = Math.max(...usual.flat(), ...own.flat()) * 1.05 || 1;
    const step = [1, 2, 5, 10].map((m) => m * 10 ** Math.floor(Math.log10(top / 5))).find((each) => top / each <= 6);
    const y = (value) => `${100 - (100 * value) / top}%`, x = (layer) => 4 + (94 * layer) / L;
    const grid = [];
    for (let value = 0; value <= top; value += step)
      grid.push(drawn("line", { class: "grid", x1: "4%", x2: "98%", y1: y(value), y2: y(value) }),
        drawn("text", { x: "3%", y: y(value), "text-anchor": "end", dy: ".32em" }, `${+value.toPrecision(3)}`));
    const every = Math.ceil(L / 12);
    for (let layer = 0; layer <= L; layer += every)
      grid.push(drawn("text", { x: `${x(layer)}%`, y: "100%", dy: "1.5em", "text-anchor": "middle" }, layer ? `${layer}` : "embedding"));
    const line = (numbers, colour, kind) => {
      const points = numbers.map((value, i) => `${10 * x(i + L + 1 - numbers.length)},${1000 - (1000 * value) / top}`);
      return drawn("polyline", { class: `${colour} ${kind}`, points: points.join(" ") });
    };
    const lines = drawn("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", width: "100%", height: "100%" },
      ...kinds.flatMap(([, colour], i) => [line(usual[i], colour, "usual"), line(own[i], colour, "own")]));
    const dots = kinds.flatMap(([, colour], k) => usual[k].map((value, i) =>
      drawn("circle", { class: colour, r: 3, cx: `${x(i + L + 1 - usual[k].length)}%`, cy: y(value) })));
    grid.push(drawn("text", { class: "axis-title", x: "4%", y: "0", dy: "-.75em" }, "size (root mean square)"),
      drawn("text", { class: "axis-title", x: "98%", y: "100%", dy: "3em", "text-anchor": "end" }, "layer \u2192"));
    box.replaceChildren(drawn("svg", { class: "chart", role: "img", "aria-label": "Size by layer" }, ...grid, lines, ...dots));
    part("sizes-text").textContent = `Solid lines: the median over the tokens. Dotted lines: the selected token ${text.name(token)} ` +
      `(token ${token + 1}).`;
  };
}

function neighboursView(text, part) {
  return ({ token }) => {
    const id = text.data.tokens[token];
    part("neighbours").replaceChildren(make("p", {}, "Nearest to ", mono(text.name(token)), ":"), make("div", { class: "chips" },
      ...text.data.neighbours[id].map(([other, cosine]) => make("span", {}, mono(text.id(other)), make("small", {}, cosine.toFixed(2))))));
  };
}
