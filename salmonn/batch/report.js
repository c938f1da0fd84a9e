"use strict";
// Shows the captions that match the search and the filters, a page at a time; videos load on a click.
const PAGE_SIZE = 48;
const rows = JSON.parse(document.querySelector("#rows").textContent);
const blocks = [...document.querySelectorAll("script.images")];
const images = []; // parsed blocks
const at = (id) => document.querySelector(`#${id}`);
const names = new Intl.Collator("en", { numeric: true });
const orders = {
  name: (a, b) => names.compare(a.video, b.video),
  shortest: (a, b) => a.words - b.words,
  longest: (a, b) => b.words - a.words,
};
let found = rows;
let page = 0;

function image(number) {
  const size = Number(blocks[0].dataset.size);
  const index = Math.floor(number / size);
  images[index] ??= JSON.parse(blocks[index].textContent);
  return images[index][number % size];
}

function element(tag, { text, name, ...attributes } = {}, children = []) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const terms = () => at("search").value.toLowerCase().split(/\s+/).filter(Boolean);

// The text, with the places that match the search marked.
function marked(text, words) {
  const lower = text.toLowerCase();
  if (lower.length !== text.length) return [text]; // some letters are longer in lower case
  const parts = [];
  let end = 0;
  for (;;) {
    const places = words.map((word) => [lower.indexOf(word, end), word.length]).filter(([place]) => place >= 0);
    if (!places.length) return [...parts, text.slice(end)];
    const [place, length] = places.reduce((a, b) => (b[0] < a[0] || (b[0] === a[0] && b[1] > a[1]) ? b : a));
    parts.push(text.slice(end, place), element("mark", { text: text.slice(place, place + length) }));
    end = place + length;
  }
}

function picture(row) {
  const media = element("div", { name: "media" });
  const still = row.image === undefined
    ? element("p", { name: "absent", text: row.reason })
    : element("img", { src: image(row.image), alt: "", decoding: "async" });
  media.append(still);
  if (row.link) {
    const play = element("button", { type: "button", name: "play", "aria-label": `Play ${row.video}`, text: "Play" });
    play.addEventListener("click", () => {
      const video = element("video", { controls: "", playsinline: "", src: row.link, "aria-label": row.video });
      video.addEventListener("loadedmetadata", () => (video.currentTime = row.start ?? 0), { once: true });
      video.addEventListener("error", () => video.replaceWith(element("p", { name: "absent", text: "This browser cannot play the file." })));
      media.replaceChildren(video);
      video.play().catch(() => {}); // the controls remain
    });
    media.append(play);
  }
  return media;
}

function card(row, words) {
  const name = row.video.lastIndexOf("/") + 1;
  const folder = name ? [element("span", { name: "folder" }, marked(row.video.slice(0, name), words))] : [];
  const title = element("h3", {}, [...folder, ...marked(row.video.slice(name), words)]);
  const details = [row.span, row.sample && `sample ${row.sample}`, !row.issues?.includes("failed") && `${row.words} word${row.words === 1 ? "" : "s"}`];
  title.append(" ", element("small", { text: details.filter(Boolean).join(" · ") }));
  const text = element("p", { name: "caption", dir: "auto" }, marked(row.text ?? "", words));
  const body = [title, text];
  if (row.issues) body.push(element("p", { name: "issues" }, row.issues.map((issue) => element("span", { text: issue, "data-issue": issue }))));
  if (row.notes) body.push(element("ul", { name: "warned" }, row.notes.map((note) => element("li", { text: note }))));
  const made = element("article", { "data-video": row.video }, [picture(row), element("div", { name: "words" }, body)]);
  made.classList.toggle("failed", Boolean(row.issues?.includes("failed")));
  return made;
}

function render() {
  const words = terms();
  const first = page * PAGE_SIZE;
  const shown = found.slice(first, first + PAGE_SIZE);
  at("clips").replaceChildren(...shown.map((row) => card(row, words)));
  const format = (number) => number.toLocaleString("en");
  const range = shown.length ? `${format(first + 1)}\u2013${format(first + shown.length)} of ` : "";
  at("shown").textContent = `${range}${format(found.length)}` + (found.length < rows.length ? ` (${format(rows.length)} in all)` : "");
  const last = Math.max(Math.ceil(found.length / PAGE_SIZE) - 1, 0);
  at("pages").hidden = last === 0;
  at("page").textContent = `Page ${format(page + 1)} of ${format(last + 1)}`;
  at("previous").disabled = page === 0;
  at("next").disabled = page === last;
}

function update() {
  const words = terms();
  const issue = document.querySelector("#filter input:checked").value;
  const limit = (id, other) => (at(id).value === "" ? other : Number(at(id).value));
  const [least, most] = [limit("min-words", 0), limit("max-words", Infinity)];
  const isLimited = least > 0 || most < Infinity;
  found = rows.filter((row) => {
    if (issue && !row.issues?.includes(issue)) return false;
    if (isLimited && (row.words < least || row.words > most || row.issues?.includes("failed"))) return false;
    row.lower ??= `${row.video}\n${row.text ?? ""}`.toLowerCase();
    return words.every((word) => row.lower.includes(word));
  });
  const order = orders[at("sort").value];
  if (order) found.sort(order);
  page = 0;
  render();
}

function turn(step) {
  page += step;
  render();
  at("captions").scrollIntoView();
}

at("tools").hidden = false;
at("tools").addEventListener("input", update);
at("previous").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));
at("histogram").addEventListener("click", (event) => {
  const bar = event.target.closest("button");
  if (!bar) return;
  at("min-words").value = bar.dataset.first;
  at("max-words").value = bar.dataset.last;
  update();
  at("captions").scrollIntoView();
});
update();
