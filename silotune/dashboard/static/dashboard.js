// Keeps an open run page up to date, and asks before what can't be undone. No library, no eval.
"use strict";

document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});

const { live, stream } = document.body.dataset;

if (live && stream) {
  const lost = document.getElementById("link");
  let wanted = false;
  let busy = false;

  // The server renders and escapes; the page only puts the parts that changed in place.
  async function refresh() {
    if (busy) {
      wanted = true;
      return;
    }
    busy = true;
    try {
      const answer = await fetch(live, { headers: { "silotune-live": "1" } });
      if (answer.status === 401) {
        window.location.assign("/signin");
        return;
      }
      if (answer.ok) {
        const news = await answer.json();
        for (const part of document.querySelectorAll("[data-part]")) {
          const html = news.sections[part.dataset.part];
          if (html !== undefined && part.dataset.shown !== html) {
            part.innerHTML = html;
            part.dataset.shown = html;
          }
        }
        for (const form of document.querySelectorAll("[data-when]")) {
          form.hidden = !form.dataset.when.split(" ").includes(news.state);
        }
        document.body.dataset.id = news.id;
      }
    } catch {
      // The stream tells about a lost connection, and its return asks for news again.
    } finally {
      setTimeout(() => {
        busy = false;
        if (wanted) {
          wanted = false;
          refresh();
        }
      }, 1000);
    }
  }

  const events = new EventSource(stream);
  events.onopen = () => {
    if (!lost.hidden) refresh();
    lost.hidden = true;
  };
  events.onmessage = refresh;
  events.addEventListener("over", () => {
    events.close();
    refresh();
  });
  events.onerror = () => {
    lost.hidden = false;
  };
}
