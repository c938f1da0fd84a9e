"use strict";
// Actions in the browser: seek, copy, and fit frames to their content.
window.salmonn = {
  // Without https, browsers only offer the old way to copy.
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
  seek(target) {
    const video = target.closest(".columns")?.querySelector("video");
    if (!video) return;
    video.currentTime = Number(target.dataset.seek);
    video.scrollIntoView({ block: "nearest", behavior: "smooth" });
  },
  // On a phone the answer is below the button.
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
  const target = event.target.closest("[data-seek]");
  if (target) window.salmonn.seek(target);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("mark[data-seek]")) window.salmonn.seek(event.target);
});
// "load" does not bubble, but can be captured.
document.addEventListener("load", (event) => {
  if (event.target.matches?.("iframe.run")) window.salmonn.fit(event.target);
}, true);
addEventListener("resize", () => document.querySelectorAll("iframe.run").forEach(window.salmonn.fit));
