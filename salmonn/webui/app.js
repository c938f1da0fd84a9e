"use strict";
// Actions in the browser: choose an example, play, seek, record, copy, remember, and fit frames to their content.
window.salmonn = {
  // Without https, browsers only offer the old way to copy.
  copy(selector) {
    const lines = [...document.querySelectorAll(`${selector} .caption`)].map((caption) => {
      const time = caption.closest(".segments li")?.querySelector(".timestamp");
      return (time ? `${time.textContent} ` : "") + caption.textContent.trim();
    });
    const text = lines.join("\n");
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
    const columns = target.closest(".columns") ?? document.querySelector("#tab-caption .columns");
    const media = columns?.querySelector(".player :is(video, audio)");
    const entry = target.closest("[data-clip]");
    if (!media || (entry && entry.dataset.clip !== media.getAttribute("src"))) return;
    media.currentTime = Number(target.dataset.seek);
    media.play().catch(() => {});  // a format that the browser cannot play
    media.scrollIntoView({ block: "nearest", behavior: "smooth" });
  },
  // Return an example as the value of a file component.
  example([path, still, size]) {
    const address = (file) => `${window.gradio_config.root}${window.gradio_config.api_prefix}/file=${encodeURI(file)}`;
    const url = address(path);
    this.posters[url] = address(still);
    return { path, url, size, orig_name: path.split("/").pop(), mime_type: "video/mp4", meta: { _type: "gradio.FileData" } };
  },
  nextExample(file, examples) {
    const index = examples.findIndex(([path]) => path === file?.path);
    return this.example(examples[(index + 1) % examples.length]);
  },
  // Return the random id under which this browser's votes are saved, made at the first vote; "" if it stores nothing.
  rater() {
    try {
      const stored = localStorage.getItem("salmonn-rater");
      if (/^[0-9a-f]{32}$/.test(stored)) return stored;
      const bytes = crypto.getRandomValues(new Uint8Array(16));
      const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
      localStorage.setItem("salmonn-rater", id);
      return id;
    } catch {
      return "";
    }
  },
  posters: {},
  // Return a player for a file as HTML, and mark the example that it is.
  player(tab, file) {
    const poster = this.posters[file?.url];
    document.querySelectorAll(`#tab-${tab} .examples button`).forEach((button) => {
      const still = button.querySelector("img")?.getAttribute("src");
      button.setAttribute("aria-pressed", Boolean(poster) && still.split("/").pop() === poster.split("/").pop());
    });
    document.querySelector(`#${tab}-video .player`).classList.remove("unplayable");
    document.querySelectorAll(`#${tab}-video :is(.too-large, .recorder)`).forEach((element) => element.remove());
    if (tab === "caption") this.markEntries(file?.url);
    if (!file) return "";
    const media = document.createElement(file.mime_type?.startsWith("audio/") ? "audio" : "video");
    Object.assign(media, { controls: true, preload: "metadata", src: file.url });
    if (poster) media.poster = poster;
    media.setAttribute("playsinline", "");
    return `${media.outerHTML}<p class="note">Your browser can't play this format; it can still be captioned.</p>`;
  },
  // Mark the segment that is played.
  followSegments(media) {
    const lines = media.closest(".columns")?.querySelectorAll(".segments li") ?? [];
    for (const line of lines) {
      const isPlayed = Number(line.dataset.start) <= media.currentTime && media.currentTime < Number(line.dataset.end);
      line.toggleAttribute("data-played", isPlayed && media.currentTime > 0);
    }
  },
  showError(zone, text) {
    zone.querySelector(".too-large")?.remove();
    const message = document.createElement("p");
    message.className = "error-box too-large";
    message.setAttribute("role", "alert");
    message.textContent = text;
    zone.append(message);
  },
  // On a phone the answer is below the button.
  reveal(selector) {
    if (matchMedia("(max-width: 46rem)").matches) {
      document.querySelector(selector)?.scrollIntoView({ block: "start", behavior: "smooth" });
    }
  },
  started: {},  // tab -> time of the last click that started a request, in milliseconds
  start(tab, inputs, revealed) {
    if (revealed) this.reveal(revealed);
    this.started[tab] = performance.now();
    return [...inputs.slice(0, -1), this.started[tab]];
  },
  // Return updates that clear a tab after a change of its video at a time; none if a request was started since.
  clear(tab, changed, updates) {
    const isLatest = changed > (this.started[tab] ?? 0);
    return updates.map((update) => (isLatest ? update : { __type__: "update" }));
  },
  fit(frame) {
    frame.style.height = "auto";  // else the content is at least as high as the frame
    const height = frame.contentDocument?.documentElement?.scrollHeight;
    if (height) frame.style.height = `${height}px`;
  },
};
document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-seek]");
  if (target) window.salmonn.seek(target);
});
// Keys for voters: the vote buttons are named by theirs, and the right arrow shows the next pair.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.target.closest("input:not([type=radio], [type=checkbox]), textarea, select, video, audio")) return;
  const id = event.key === "ArrowRight" ? "next-pair" : `vote-${event.key.toLowerCase()}`;
  const button = document.getElementById(id);
  if (button?.offsetParent) button.click();
});
// Gradio would show an error without the limit's reason instead of the drop zone.
for (const type of ["change", "drop"]) {
  document.addEventListener(type, (event) => {
    const zone = event.target.closest?.(".media-input");
    const limit = window.gradio_config?.max_file_size;
    const [file] = (type === "drop" ? event.dataTransfer : event.target).files ?? [];
    zone?.querySelector(".too-large")?.remove();
    if (!zone || !file || !limit || file.size <= limit) return;
    event.stopImmediatePropagation();
    event.preventDefault();
    window.salmonn.showError(zone, `“${file.name}” has ${(file.size / 2 ** 20).toFixed(1)} MiB; the limit is ${limit / 2 ** 20} MiB. Shorten it or reduce its resolution.`);
    event.target.value = "";
  }, true);
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("mark[data-seek]")) window.salmonn.seek(event.target);
});
// "load" does not bubble, but can be captured.
document.addEventListener("load", (event) => {
  if (event.target.matches?.("iframe.run")) window.salmonn.fit(event.target);
}, true);
document.addEventListener("error", (event) => {
  event.target.closest?.(".player")?.classList.add("unplayable");
}, true);
addEventListener("resize", () => document.querySelectorAll("iframe.run").forEach(window.salmonn.fit));
// Recordings declare no duration; a browser finds it when it seeks to the end.
document.addEventListener("loadedmetadata", (event) => {
  const media = event.target;
  if (!media.closest?.(".player") || media.duration !== Infinity) return;
  media.addEventListener("durationchange", () => { media.currentTime = 0; }, { once: true });
  media.currentTime = Number.MAX_SAFE_INTEGER;
}, true);
document.addEventListener("timeupdate", (event) => {
  if (event.target.closest?.(".player")) window.salmonn.followSegments(event.target);
}, true);
