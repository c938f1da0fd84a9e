"use strict";
// Recordings by camera and microphone, which are uploaded like files.
(() => {
  const FORMATS = {
    camera: ["video/webm;codecs=vp9,opus", "video/webm", "video/mp4"],
    microphone: ["audio/webm;codecs=opus", "audio/webm", "audio/mp4"],
  };
  const REASONS = {
    NotAllowedError: "This page may not use the camera or microphone: allow it in the browser's address bar.",
    NotFoundError: "No camera or microphone was found: connect one, or choose a file.",
    NotReadableError: "The camera or microphone is in use by another program: close that, then try again.",
  };

  async function openDevices(kind) {
    if (!navigator.mediaDevices || !window.MediaRecorder) {
      throw new Error("Browsers only record on a secure page: open it by https, or on the same machine as localhost.");
    }
    if (kind === "microphone") return navigator.mediaDevices.getUserMedia({ audio: true });
    try {
      return await navigator.mediaDevices.getUserMedia({ video: true, audio: true });
    } catch (error) {
      if (error.name !== "NotFoundError") throw error;
      return navigator.mediaDevices.getUserMedia({ video: true });  // a camera without a microphone
    }
  }

  function addPanel(zone, kind, stream) {
    const panel = document.createElement("div");
    panel.className = "recorder";
    panel.setAttribute("role", "group");
    panel.setAttribute("aria-label", "Recording");
    if (kind === "camera") {
      const preview = document.createElement("video");
      Object.assign(preview, { muted: true, autoplay: true, playsInline: true, srcObject: stream });
      panel.append(preview);
    }
    const row = document.createElement("p");
    row.innerHTML = '<span class="elapsed" role="timer">0:00</span><button type="button" class="finish">Use recording</button>'
      + '<button type="button" class="cancel">Cancel</button>';
    panel.append(row);
    zone.append(panel);
    panel.querySelector(".finish").focus();
    return panel;
  }

  // Record until a button is pressed, or the time is up; return a Blob, or null if it was cancelled.
  function recordStream(stream, panel, kind, maxSeconds) {
    const mimeType = FORMATS[kind].find((format) => MediaRecorder.isTypeSupported(format));
    const recorder = new MediaRecorder(stream, mimeType ? { mimeType } : {});
    const parts = [];
    return new Promise((resolve) => {
      let isCancelled = false;
      const start = performance.now();
      const stop = (cancel) => {
        isCancelled = cancel;
        if (recorder.state !== "inactive") recorder.stop();
      };
      recorder.start(1000);  // first: if it throws, nothing else has begun
      const timer = setInterval(() => {
        const seconds = Math.floor((performance.now() - start) / 1000);
        panel.querySelector(".elapsed").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
        // Another file was chosen, or the time is up.
        if (!panel.isConnected) stop(true);
        else if (seconds >= maxSeconds - 1) stop(false);
      }, 200);
      recorder.ondataavailable = (event) => { if (event.data.size) parts.push(event.data); };
      recorder.onstop = () => {
        clearInterval(timer);
        resolve(isCancelled || !parts.length ? null : new Blob(parts, { type: recorder.mimeType }));
      };
      panel.querySelector(".finish").onclick = () => stop(false);
      panel.querySelector(".cancel").onclick = () => stop(true);
      panel.onkeydown = (event) => { if (event.key === "Escape") stop(true); };
    });
  }

  async function upload(blob, kind) {
    const { root, api_prefix: prefix, max_file_size: limit } = window.gradio_config;
    if (limit && blob.size > limit) {
      throw new Error(`The recording has ${(blob.size / 2 ** 20).toFixed(1)} MiB; the limit is ${limit / 2 ** 20} MiB.`);
    }
    const time = new Date().toTimeString().slice(0, 8).replaceAll(":", "-");
    const suffix = blob.type.includes("mp4") ? "mp4" : "webm";
    const name = `${kind} ${time}.${suffix}`;
    const form = new FormData();
    form.append("files", blob, name);
    const reply = await fetch(`${root}${prefix}/upload`, { method: "POST", body: form });
    if (!reply.ok) {
      const { detail } = await reply.json().catch(() => ({}));
      throw new Error(`The recording could not be uploaded: ${detail ?? reply.status}.`);
    }
    const [path] = await reply.json();
    return {
      path, url: `${root}${prefix}/file=${encodeURI(path)}`, size: blob.size, orig_name: name,
      mime_type: blob.type.split(";")[0], meta: { _type: "gradio.FileData" },
    };
  }

  const UNCHANGED = { __type__: "update" };

  // Return a recording as the value of a file component; if there is none, nothing changes.
  window.salmonn.record = async (tab, kind, maxSeconds) => {
    const zone = document.querySelector(`#${tab}-video`);
    if (zone.dataset.recording) return UNCHANGED;  // a second click while the browser asks for permission
    zone.dataset.recording = kind;
    zone.querySelectorAll(":is(.recorder, .too-large)").forEach((element) => element.remove());
    let stream, panel;
    try {
      stream = await openDevices(kind);
      panel = addPanel(zone, kind, stream);
      const blob = await recordStream(stream, panel, kind, maxSeconds);
      return blob ? await upload(blob, kind) : UNCHANGED;
    } catch (error) {
      window.salmonn.showError(zone, REASONS[error.name] ?? error.message);
      return UNCHANGED;
    } finally {
      delete zone.dataset.recording;
      stream?.getTracks().forEach((track) => track.stop());
      panel?.remove();
    }
  };
})();
