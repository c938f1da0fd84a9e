"use strict";
// Adds the filter, the sort order, and jumps to an event in its video. The page is complete without it.
const clips = document.querySelector("#clips");
const cards = [...clips.children];

function show() {
  const kind = document.querySelector("#filter input:checked").value;
  clips.dataset.show = kind;
  for (const card of cards) card.hidden = kind !== "all" && !card.dataset.kinds.split(" ").includes(kind);
  const count = cards.filter((card) => !card.hidden).length;
  document.querySelector("#shown").textContent = `${count} of ${cards.length} shown`;
}

function sort() {
  const byName = document.querySelector("#sort select").value === "name";
  // The page is written in order of Total; a stable sort keeps that order among equal names.
  const names = new Intl.Collator("en", { numeric: true });
  const sorted = byName ? [...cards].sort((a, b) => names.compare(a.dataset.name, b.dataset.name)) : cards;
  clips.append(...sorted);
}

function seek(target) {
  const video = target.closest("article").querySelector("video");
  video.currentTime = Number(target.dataset.seek);
  video.scrollIntoView({ block: "nearest" });
}

for (const tool of document.querySelectorAll("#filter, #sort")) tool.hidden = false;
document.querySelector("#filter").addEventListener("change", show);
document.querySelector("#sort select").addEventListener("change", sort);
for (const mark of document.querySelectorAll("mark[data-seek]")) {
  mark.tabIndex = 0;
  mark.setAttribute("role", "button");
}
clips.addEventListener("click", (event) => {
  const target = event.target.closest("[data-seek]");
  if (!target) return;
  event.preventDefault();
  seek(target);
});
clips.addEventListener("keydown", (event) => {
  if (!event.target.matches("mark[data-seek]") || !["Enter", " "].includes(event.key)) return;
  event.preventDefault();
  seek(event.target);
});
// A browser may restore the form values of the previous page view.
show();
sort();
