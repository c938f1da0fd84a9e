"use strict";
// The tab Dataset: edit a caption in its card, accept it, and play its video. Unsaved texts survive updates of the grid.
window.salmonn.dataset = {
  drafts: {}, // row -> unsaved text
  command: null,
  // Return what a person did, for the server, which handles each command once.
  take() {
    const command = JSON.stringify(this.command);
    this.command = null;
    return command;
  },
  send(command) {
    this.command = command;
    document.querySelector("#dataset-command").click();
  },
  edit(card) {
    if (card.querySelector("textarea")) return;
    const row = card.dataset.row;
    const area = document.createElement("textarea");
    area.value = this.drafts[row] ?? card.dataset.text;
    area.setAttribute("aria-label", "Caption");
    area.dir = "auto";
    area.addEventListener("input", () => {
      this.drafts[row] = area.value;
      this.grow(area);
    });
    const text = card.querySelector(".text");
    const actions = card.querySelector(".row-actions");
    const [save, cancel] = [["save", "Save"], ["cancel", "Cancel"]].map(([act, label]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: label, className: act });
      button.dataset.act = act;
      return button;
    });
    this.drafts[row] ??= card.dataset.text;
    const before = [...actions.childNodes];
    // The server would send the same card again, which changes nothing on the page.
    card.close = () => {
      area.replaceWith(text);
      actions.replaceChildren(...before);
    };
    text.replaceWith(area);
    actions.replaceChildren(save, cancel);
    this.grow(area);
    return area;
  },
  grow(area) {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  },
  // Reopen the texts that are not saved yet.
  restore() {
    for (const card of document.querySelectorAll("#dataset-grid .row")) {
      if (card.dataset.row in this.drafts) this.edit(card);
    }
  },
  // The server has saved this row.
  saved(row) {
    delete this.drafts[row];
  },
  act(button) {
    const card = button.closest(".row");
    const { row, text } = card.dataset;
    const act = button.dataset.act;
    if (act === "edit") this.edit(card).focus();
    if (act === "accept") this.send({ act, row: Number(row), before: text });
    if (act === "save") this.send({ act, row: Number(row), before: text, text: card.querySelector("textarea").value });
    if (act === "cancel") {
      this.saved(row);
      card.close();
    }
    if (act === "play") {
      const video = document.createElement("video");
      Object.assign(video, { controls: true, src: button.dataset.video });
      video.setAttribute("playsinline", "");
      video.addEventListener("loadedmetadata", () => { video.currentTime = Number(button.dataset.start); }, { once: true });
      video.addEventListener("error", () => {
        const note = Object.assign(document.createElement("p"), { className: "absent", textContent: "This browser can't play the format." });
        video.replaceWith(note);
      });
      card.querySelector(".media").replaceChildren(video);
      video.play().catch(() => {}); // the controls remain
    }
  },
};
document.addEventListener("click", (event) => {
  const button = event.target.closest("#dataset-grid [data-act]");
  if (button) window.salmonn.dataset.act(button);
});
document.addEventListener("keydown", (event) => {
  const area = event.target.closest?.("#dataset-grid textarea");
  if (!area) return;
  const card = area.closest(".row");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) card.querySelector("[data-act=save]").click();
  if (event.key === "Escape") card.querySelector("[data-act=cancel]").click();
});
new MutationObserver((changes) => {
  if (changes.some((change) => change.target.closest?.("#dataset-grid"))) {
    for (const mark of document.querySelectorAll("#dataset-grid [data-saved]")) {
      window.salmonn.dataset.saved(mark.dataset.saved);
      mark.removeAttribute("data-saved");
    }
    window.salmonn.dataset.restore();
  }
}).observe(document, { childList: true, subtree: true });
