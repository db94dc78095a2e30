"use strict";
/* The page. What it shows follows from the address: #like=ID, #upload=N (an image that this page still holds) or, without
   either, some images to begin with (#seed=N); beside these k=COUNT and under=FOLDER. So the browser's history works. */

const at = (id) => document.getElementById(id);
const uploads = new Map(); // number -> the File
let facts = { most_bytes: Infinity };
let running = new AbortController();

/* ---------------------------------------------------------------- the address */

const state = () => new URLSearchParams(location.hash.slice(1));

/* The address of a state; the results' number and the folder stay as they are set. */
function address(values) {
  const parts = new URLSearchParams(values);
  if (at("k").value !== "20") parts.set("k", at("k").value);
  if (at("under").value.trim()) parts.set("under", at("under").value.trim());
  return "#" + parts;
}

const go = (values) => { location.hash = address(values); };

/* ---------------------------------------------------------------- the server's answers */

/* The JSON of an answer. Throws an Error whose message can be shown. */
async function answer(path, options) {
  let response, content;
  try {
    response = await fetch(path, options);
    content = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(response ? "The server's answer cannot be read." : "The server cannot be reached: is it still running?");
  }
  if (!response.ok) {
    const prefix = { 413: "This image is too large", 503: "The server is busy" }[response.status];
    const text = String(content.error);
    throw new Error(prefix ? `${prefix} (${text.replace(/^too large: /, "")}).` : `${text[0].toUpperCase()}${text.slice(1)}.`);
  }
  return content;
}

function asked(where, signal) {
  const query = new URLSearchParams();
  for (const name of ["k", "under"]) if (where.get(name)) query.set(name, where.get(name));
  if (where.has("upload")) {
    const file = uploads.get(where.get("upload"));
    if (!file) throw new Error("That image is no longer held here: choose it again.");
    const sizes = `${(file.size / 1e6).toFixed(1)} MB; at most ${(facts.most_bytes / 1e6).toFixed(1)} MB are taken`;
    if (file.size > facts.most_bytes) throw new Error(`This image is too large (${sizes}).`);
    const type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
    return answer(`/search?${query}`, { method: "POST", body: file, headers: { "Content-Type": type }, signal });
  }
  if (where.has("like")) return answer(`/like/${encodeURIComponent(where.get("like"))}?${query}`, { signal });
  query.set("seed", where.get("seed") || "0");
  return answer(`/sample?${query}`, { signal });
}

/* ---------------------------------------------------------------- showing */

async function show() {
  running.abort();
  running = new AbortController();
  const { signal } = running, where = state();
  at("k").value = where.get("k") || "20";
  if (!at("k").value) at("k").value = "20"; /* a number that is not in the list */
  at("under").value = where.get("under") || "";
  at("error").textContent = "";
  at("results").setAttribute("aria-busy", "true");
  at("status").textContent = "Searching …";
  const goesOn = at("results").contains(document.activeElement);
  try {
    const found = await asked(where, signal);
    showQuery(where, found);
    showHits(found.hits);
    if (goesOn && found.hits.length) {
      at("results").querySelector("a").focus({ preventScroll: true });
      window.scrollTo(0, 0);
    }
    at("status").textContent = summary(where, found);
  } catch (error) {
    if (signal.aborted) return;
    showQuery(where, null);
    showHits([]);
    at("status").textContent = "";
    at("error").textContent = error.message;
  }
  at("results").removeAttribute("aria-busy");
  const searched = where.has("like") || where.has("upload");
  at("others").hidden = searched || at("error").textContent !== "";
  at("others").href = address({ seed: Number(where.get("seed") || 0) + 1 });
}

function summary(where, found) {
  const count = `${found.hits.length} image${found.hits.length === 1 ? "" : "s"}`;
  if (!where.has("like") && !where.has("upload")) return `${count} to begin with: pick one, or choose your own.`;
  if (!found.hits.length) return "Nothing was found.";
  const kind = found.hits[0].cosine === null ? "by code score" : "by cosine";
  return `${count}, most alike first (${kind}), in ${Math.max(1, Math.round(1000 * found.seconds))} ms.`;
}

function showQuery(where, found) {
  const file = uploads.get(where.get("upload")), like = where.get("like"), size = found && found.query;
  at("query").hidden = !(file || (like && found));
  at("picked").hidden = !like;
  at("preview").hidden = true;
  document.title = "Search by image";
  if (at("query").hidden) return;
  if (like) at("picked").src = thumb(like);
  else preview(file);
  const name = like ? found.query.name : file.name || "the pasted image";
  at("asked").textContent = found ? `Like ${name}` : name;
  at("detail").textContent = size && size.width ? `${size.width} × ${size.height} pixels` : "";
  document.title = `Like ${name} - Search by image`;
}

/* The chosen image, drawn: as an address of its own, the page's security policy would refuse it. */
async function preview(file) {
  const canvas = at("preview"), context = canvas.getContext("2d");
  try {
    const image = await createImageBitmap(file);
    const side = Math.min(image.width, image.height);
    canvas.width = canvas.height = 224;
    context.drawImage(image, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, 224, 224);
    image.close();
    canvas.hidden = uploads.get(state().get("upload")) !== file;
  } catch { /* not a format that the browser shows; the server may still read it */ }
}

const thumb = (id) => `/thumb/${encodeURIComponent(id)}`;

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function showHits(hits) {
  at("results").replaceChildren(...hits.map((hit) => {
    const item = document.createElement("li"), link = element("a", ""), image = element("img", "");
    Object.assign(image, { alt: "", loading: "lazy", decoding: "async", width: 150, height: 150, src: thumb(hit.id) });
    image.addEventListener("error", () => image.replaceWith(element("span", "gone", "file is gone")));
    link.href = address({ like: hit.id });
    link.title = `${hit.name}, ${hit.width} × ${hit.height}`;
    const caption = element("span", "caption"), cut = hit.name.lastIndexOf("/") + 1, score = hit.cosine ?? hit.score;
    caption.append(element("span", "name", hit.name.slice(cut)));
    if (score !== null) caption.append(element("span", "score", score.toFixed(3)));
    link.append(image, caption);
    if (cut) link.append(element("span", "folder", hit.name.slice(0, cut - 1)));
    item.append(link);
    return item;
  }));
}

/* ---------------------------------------------------------------- choosing, dropping, pasting */

function upload(file) {
  const number = String(uploads.size + 1);
  uploads.set(number, file);
  go({ upload: number });
}

function given(files, none) {
  if (files.length) upload(files[0]);
  else at("error").textContent = none;
}

at("choose").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  if (at("file").files.length) upload(at("file").files[0]);
  at("file").value = ""; /* the same file can be chosen again */
});
document.addEventListener("paste", (event) => {
  if (event.target.tagName === "INPUT" && !event.clipboardData.files.length) return;
  event.preventDefault();
  given(event.clipboardData.files, "There is no image in the clipboard.");
});
let inside = 0; /* of the elements that the dragged file entered */
document.addEventListener("dragenter", (event) => {
  event.preventDefault();
  inside += 1;
  at("drop").hidden = false;
});
document.addEventListener("dragleave", () => {
  inside -= 1;
  at("drop").hidden = inside > 0;
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  at("drop").hidden = true;
  given(event.dataTransfer.files, "What was dropped is no file: copy the image and paste it instead.");
});

/* ---------------------------------------------------------------- controls and keys */

function changed() {
  const { like, upload: number, seed } = Object.fromEntries(state());
  go(like ? { like } : number ? { upload: number } : seed ? { seed } : {});
}

at("k").addEventListener("change", changed);
at("under").addEventListener("change", changed);
at("controls").addEventListener("submit", (event) => event.preventDefault());

/* Where an arrow key leads from a result: left and right by one, up and down by a row. */
function next(links, from, key) {
  const top = links[0].offsetTop, row = links.filter((link) => link.offsetTop === top).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[key];
  if (key === "Home") return links[0];
  if (key === "End") return links[links.length - 1];
  return from < 0 ? links[0] : links[from + step];
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === "o" || event.key === "/") {
    event.preventDefault();
    at("file").click();
    return;
  }
  const links = [...at("results").querySelectorAll("a")], from = links.indexOf(document.activeElement);
  const moves = /^Arrow/.test(event.key) || (from >= 0 && /^(Home|End)$/.test(event.key));
  if (!moves || !links.length || (from < 0 && event.key !== "ArrowDown")) return;
  const target = next(links, from, event.key);
  event.preventDefault();
  if (target) target.focus();
});

window.addEventListener("hashchange", show);
answer("/info").then((info) => {
  facts = info;
  at("facts").textContent = `${info.images.toLocaleString("en")} images, ${info.method}, ${info.bits} bits each`;
}).catch(() => {}).finally(show);
