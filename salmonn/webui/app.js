"use strict";
// What the page does in the browser alone: seek, copy, and frames as high as what is in them.
window.salmonn = {
  // Where the page is not served by https, browsers offer no clipboard but the old way.
  copy(selector) {
    const text = document.querySelector(selector)?.textContent.trim() ?? "";
    if (navigator.clipboard && window.isSecureContext) {
      navigator.clipboard.writeText(text);
      return;
    }
    const area = document.createElement("textarea");
    area.value = text;
    area.style.position = "fixed";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  },
  seek(place) {
    const video = place.closest(".bench")?.querySelector("video");
    if (!video) return;
    video.currentTime = Number(place.dataset.seek);
    video.scrollIntoView({ block: "nearest", behavior: "smooth" });
  },
  // On a phone the answer stands below the button that asks for it.
  reveal(selector) {
    if (matchMedia("(max-width: 46rem)").matches) {
      document.querySelector(selector)?.scrollIntoView({ block: "start", behavior: "smooth" });
    }
  },
  fit(frame) {
    const height = frame.contentDocument?.documentElement?.scrollHeight;
    if (height) frame.style.height = `${height}px`;
  },
};
document.addEventListener("click", (event) => {
  const place = event.target.closest("[data-seek]");
  if (place) window.salmonn.seek(place);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("mark[data-seek]")) window.salmonn.seek(event.target);
});
// "load" does not bubble, but can be caught on its way down.
document.addEventListener("load", (event) => {
  if (event.target.matches?.("iframe.run")) window.salmonn.fit(event.target);
}, true);
addEventListener("resize", () => document.querySelectorAll("iframe.run").forEach(window.salmonn.fit));
