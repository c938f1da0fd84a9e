"use strict";
// Earlier answers, kept by this browser tab until it is closed: text and a small picture, no video.
(() => {
  const MAX_ENTRIES = 30;
  const STILL_WIDTH = 160;
  const STILL_SECONDS = 4;  // the most that is waited for a picture
  const prefix = "salmonn-history-";
  // After another user's login in the same tab, nothing is left of the one before.
  const key = () => prefix + (window.gradio_config?.username ?? "");

  function load() {
    for (const name of Object.keys(sessionStorage)) {
      if (name.startsWith(prefix) && name !== key()) sessionStorage.removeItem(name);
    }
    try {
      return JSON.parse(sessionStorage.getItem(key())) ?? [];
    } catch {
      return [];
    }
  }

  function save(entries) {
    for (; entries.length; entries.pop()) {
      try {
        sessionStorage.setItem(key(), JSON.stringify(entries));
        return;
      } catch { /* full: drop the oldest */ }
    }
    sessionStorage.removeItem(key());
  }

  function shrink(image, width, height) {
    const canvas = document.createElement("canvas");
    canvas.width = STILL_WIDTH;
    canvas.height = Math.max(1, Math.round(STILL_WIDTH * height / width));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.7);
  }

  // Return a small picture of the player's clip as a URL, "" if there is none.
  async function still(media) {
    if (!(media instanceof HTMLVideoElement)) return "";
    const poster = media.getAttribute("poster");
    const image = poster ? new Image() : document.createElement("video");
    const loaded = new Promise((resolve, reject) => {
      image.onload = image.onseeked = resolve;
      image.onerror = reject;
      setTimeout(reject, 1000 * STILL_SECONDS);
    });
    if (!poster) {
      Object.assign(image, { muted: true, preload: "auto" });
      image.onloadeddata = () => { image.currentTime = Number.isFinite(image.duration) ? image.duration / 2 : 0.1; };
    }
    image.src = poster ?? media.getAttribute("src");
    try {
      await loaded;
      return shrink(image, image.naturalWidth || image.videoWidth, image.naturalHeight || image.videoHeight);
    } catch {
      return "";
    }
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    made.className = className;
    if (text) made.textContent = text;
    return made;
  }

  function renderEntry(entry) {
    const details = element("details", "entry");
    details.dataset.clip = entry.clip;
    const summary = element("summary", "");
    if (entry.still) {
      const image = element("img", "");
      Object.assign(image, { src: entry.still, alt: "" });
      summary.append(image);
    } else {
      summary.append(element("span", "no-still", "♪"));
    }
    const head = element("span", "head");
    const time = new Date(entry.time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    head.append(element("b", "", entry.name), element("small", "", `${time} · ${entry.model}`));
    head.append(element("span", "excerpt", entry.text));
    summary.append(head);
    const body = element("div", "body");
    body.innerHTML = entry.html;  // as the server has rendered it
    details.append(summary, body);
    return details;
  }

  Object.assign(window.salmonn, {
    renderHistory() {
      const entries = load();
      if (!entries.length) return "";
      const section = element("section", "history");
      section.setAttribute("aria-label", "Earlier captions");
      section.append(element("h3", "", "Earlier captions"));
      const note = "Kept in this browser tab until you close it. Videos are not kept.";
      section.append(element("p", "note", note));
      const list = element("div", "entries");
      list.append(...entries.map(renderEntry));
      section.append(list);
      const shown = document.querySelector("#caption-video .player :is(video, audio)")?.getAttribute("src");
      markOthers(list, shown);
      return section.outerHTML;
    },
    // Add an answer, or replace it by what it has become; return the history as HTML.
    async remember(json) {
      if (!json) return this.renderHistory();
      const { path, ...entry } = JSON.parse(json);
      const media = document.querySelector("#caption-video .player :is(video, audio)");
      const source = media?.getAttribute("src") ?? "";
      const isShown = source.endsWith(`file=${encodeURI(path)}`) || decodeURIComponent(source).endsWith(`file=${path}`);
      const before = load().find((one) => one.id === entry.id);
      entry.still = before?.still ?? (isShown ? await still(media) : "");
      const example = document.querySelector("#tab-caption .examples [aria-pressed=true]");
      if (isShown && example) entry.name = example.textContent.trim();
      entry.clip = before?.clip ?? (isShown ? source : "");
      entry.time = before?.time ?? Date.now();
      entry.name = before?.name ?? entry.name;
      entry.text = entry.text.slice(0, 300);
      const entries = load().filter((one) => one.id !== entry.id);
      save([entry, ...entries].slice(0, MAX_ENTRIES));
      return this.renderHistory();
    },
    forget() {
      sessionStorage.removeItem(key());
      return "";
    },
    markEntries(url) {
      markOthers(document, url);
    },
  });

  // Times can be played as long as their clip is in the player.
  function markOthers(root, url) {
    root.querySelectorAll(".entry").forEach((entry) => {
      const isOther = !url || entry.dataset.clip !== url;
      entry.classList.toggle("other-clip", isOther);
      entry.querySelectorAll("button[data-seek]").forEach((button) => { button.disabled = isOther; });
    });
  }
})();
