// The live page: streams a text from the server, lets the user choose another token, and shows the inspector
// (inspect.js) next to a complete text. All text is set as textContent, so it is never parsed as HTML.

const about = JSON.parse(document.querySelector("#data").textContent);
const play = (name) => document.querySelector(`[data-play="${name}"]`);
const view = document.querySelector(".inspector"), beside = document.querySelector(".beside");
const FIELDS = ["prompt", "temperature", "top_k", "top_p", "seed", "max_tokens"];

// The text: the ids of the prompt, and the generated pieces, each { text, tokens, element }.
const text = { given: [], dropped: 0, pieces: [] };
let running = null; // the AbortController of the stream
let inspecting = null; // the AbortController of the inspector's request

const generated = () => text.pieces.flatMap((piece) => piece.tokens.map((token) => token.id));
const tokensSaid = (count) => `${number(count)} token${count === 1 ? "" : "s"}`;

function say(message, failed = false) {
  play("status").textContent = message;
  play("status").classList.toggle("failed", failed);
}

// The settings for a request; empty fields are omitted.
function settings() {
  const values = {};
  for (const name of FIELDS.slice(1)) if (play(name).value !== "") values[name] = Number(play(name).value);
  return values;
}

function markField(name) {
  for (const field of FIELDS) play(field).setAttribute("aria-invalid", field === name);
  if (FIELDS.includes(name)) play(name).focus();
}

function buttons() {
  const ended = text.pieces.at(-1)?.finish === "stop";
  play("stop").disabled = !running;
  play("continue").disabled = Boolean(running) || !text.given.length || ended;
  document.querySelector(".play").classList.toggle("running", Boolean(running));
}

// ---------------------------------------------------------------------------------------------------------------------
// The stream
// ---------------------------------------------------------------------------------------------------------------------

async function post(path, values, signal) {
  const response = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values), signal,
  });
  if (!response.ok) throw (await response.json()).error;
  return response;
}

// The lines of a response, as they arrive.
async function* lines_of(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

// Generates from a prompt (text or ids). `fresh` begins a new text; otherwise the existing pieces are kept.
async function stream(prompt, fresh) {
  running?.abort();
  inspecting?.abort();
  const mine = (running = new AbortController());
  const first_step = fresh ? 0 : generated().length, began = performance.now();
  let count = 0;
  markField(null);
  closeAlternatives();
  beside.classList.add("stale");
  say("Waiting for the model\u2026");
  buttons();
  try {
    const response = await post("/generate", { ...settings(), prompt, first_step }, mine.signal);
    for await (const line of lines_of(response)) {
      mine.signal.throwIfAborted();
      if (line.error) throw line.error;
      if (line.prompt) {
        if (fresh) begin(line, prompt);
        say("Generating\u2026");
        continue;
      }
      add(line);
      count += line.tokens.length;
      const seconds = (performance.now() - began) / 1000;
      play("count").textContent = `${tokensSaid(count)}, ${number(Math.round(count / seconds))} per second`;
    }
    finished(text.pieces.at(-1)?.finish === "stop" ? "The model ended the text here." : "", count);
  } catch (error) {
    if (running !== mine) return; // another stream has started
    if (error.name === "AbortError") finished("Stopped.", count);
    else failed(error);
  } finally {
    if (running === mine) running = null;
    buttons();
  }
}

function failed(error) {
  beside.classList.remove("stale");
  const gone = error instanceof TypeError;
  say(gone ? "The server does not respond. Is it still running?" : error.message, true);
  if (error.param) markField(error.param);
}

function finished(how, count) {
  const cut = text.dropped ? `The first ${tokensSaid(text.dropped)} of the prompt were omitted: the model reads at most ${number(about.context)}.` : "";
  say([how || `${tokensSaid(count)} added.`, cut, "Select a token to see its alternatives."].filter(Boolean).join(" "));
  look();
}

// ---------------------------------------------------------------------------------------------------------------------
// The text
// ---------------------------------------------------------------------------------------------------------------------

function begin(line, prompt) {
  Object.assign(text, { given: line.prompt, dropped: line.dropped, pieces: [] });
  play("text").replaceChildren(make("span", { class: "given" }, prompt));
}

function add(piece) {
  const box = play("text"), atEnd = box.scrollTop + box.clientHeight > box.scrollHeight - 40;
  const index = text.pieces.length, [token] = piece.tokens;
  text.pieces.push(piece);
  if (!token) return box.append(piece.text); // the remaining text, which has no token of its own
  const ended = piece.finish === "stop", bits = -(token.logprob ?? 0) / Math.LN2;
  piece.element = make("span", {
    class: ended ? "piece end" : "piece", role: "option", "aria-selected": "false", tabindex: index ? -1 : 0,
    "--s": Math.min(bits / MOST_BITS, 1),
    "aria-label": `${piece.text || token.label}, ${percent(Math.exp(token.logprob))}`,
    onclick: () => choose(index),
  }, ended ? "end of text" : piece.text);
  box.append(piece.element);
  if (atEnd) box.scrollTop = box.scrollHeight;
}

play("text").addEventListener("keydown", (event) => {
  const at = text.pieces.findIndex((piece) => piece.element === document.activeElement);
  if (at < 0) return;
  const last = text.pieces.length - 1;
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - 10, ArrowDown: at + 10, Home: 0, End: last }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    focusPiece(Math.max(0, Math.min(last, to)));
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    choose(at);
    play("alternatives").querySelector("button").focus();
  }
});

function focusPiece(at) {
  for (const piece of text.pieces) if (piece.element) piece.element.tabIndex = -1;
  const { element } = text.pieces[at];
  if (!element) return;
  element.tabIndex = 0;
  element.focus();
}

// ---------------------------------------------------------------------------------------------------------------------
// Alternatives of a token
// ---------------------------------------------------------------------------------------------------------------------

function closeAlternatives() {
  play("alternatives").hidden = true;
  for (const piece of text.pieces) piece.element?.setAttribute("aria-selected", "false");
}

function choose(index) {
  const piece = text.pieces[index], [token] = piece.tokens, most = Math.exp(token.top[0][2]);
  closeAlternatives();
  piece.element.setAttribute("aria-selected", "true");
  const rows = token.top.some(([id]) => id === token.id) ? token.top : [...token.top, [token.id, token.label, token.logprob, piece.text]];
  const shown = (label) => label.replaceAll(" ", "\u2423");
  play("alternatives").replaceChildren(
    make("h3", {}, "Instead of ", mono(`\u201c${shown(token.label)}\u201d`)),
    make("ul", {}, ...rows.map(([id, label, logprob, characters]) => {
      const p = Math.exp(logprob);
      return make("li", {}, make("button", {
        type: "button", class: id === token.id ? "taken" : "", onclick: () => take(index, id, label, logprob, characters),
        "aria-label": `${label}, ${percent(p)}: continue from here`,
      }, mono(shown(label)), make("span", {}, make("i", { "--p": p / most })), make("span", { class: "value" }, percent(p))));
    })),
    make("p", {}, "The model\u2019s most probable tokens at this position. Select one to continue the text from there."),
  );
  play("alternatives").hidden = false;
  play("alternatives").scrollIntoView({ block: "nearest" });
}

play("alternatives").addEventListener("keydown", (event) => {
  const options = [...play("alternatives").querySelectorAll("button")], at = options.indexOf(document.activeElement);
  if (event.key === "Escape") {
    const chosen = text.pieces.findIndex((piece) => piece.element?.getAttribute("aria-selected") === "true");
    closeAlternatives();
    focusPiece(chosen);
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    options[Math.max(0, Math.min(options.length - 1, at + (event.key === "ArrowDown" ? 1 : -1)))].focus();
  }
});

// Replaces a piece with another token, and continues from there.
function take(index, id, label, logprob, characters) {
  const { top } = text.pieces[index].tokens[0];
  running?.abort();
  for (const piece of text.pieces.splice(index)) piece.element?.remove();
  add({ text: characters, tokens: [{ id, label, logprob, top }], finish: null });
  stream([...text.given, ...generated()], false);
}

// ---------------------------------------------------------------------------------------------------------------------
// The inspector
// ---------------------------------------------------------------------------------------------------------------------

async function look() {
  inspecting?.abort();
  const mine = (inspecting = new AbortController());
  const began = performance.now();
  const progress = () => {
    const seconds = Math.floor((performance.now() - began) / 1000);
    play("waiting").textContent = "Looking inside the model\u2026" + (seconds ? ` ${seconds} s` : "");
  };
  play("waiting").hidden = false;
  progress();
  const timer = setInterval(progress, 1000);
  try {
    const values = { tokens: [...text.given, ...generated()], prompt: text.given.length };
    const data = await (await post("/inspect", values, mine.signal)).json();
    if (mine.signal.aborted) return;
    view.hidden = false;
    inspector(view, data);
    play("waiting").hidden = true;
    beside.classList.remove("stale");
  } catch (error) {
    if (error.name !== "AbortError") play("waiting").textContent = error.message ?? "The server does not respond.";
  } finally {
    clearInterval(timer);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The form
// ---------------------------------------------------------------------------------------------------------------------

play("form").addEventListener("submit", (event) => {
  event.preventDefault();
  stream(play("prompt").value, true);
});
play("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    play("form").requestSubmit();
  }
});
play("stop").addEventListener("click", () => running?.abort());
play("continue").addEventListener("click", () => stream([...text.given, ...generated()], false));
play("name").textContent = about.name;
view.hidden = true;
buttons();
