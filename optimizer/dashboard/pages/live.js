"use strict";
// Keeps state and progress of the jobs on the page current. Without it the page shows what was true when it was loaded.
(() => {
  const rows = [...document.querySelectorAll("[data-job]")];
  const note = document.getElementById("live");
  const ended = new Set(["succeeded", "infeasible", "failed", "cancelled"]);
  let pause = 2000;

  const show = (row, job) => {
    const state = row.querySelector("[data-part=state]");
    const before = state.textContent;
    state.textContent = job.state;
    state.className = `state ${job.state}`;
    const progress = row.querySelector("[data-part=progress]");
    const { stage, done, total } = job.progress;
    if (job.state === "running" && stage) {
      const bar = document.createElement("progress");
      bar.max = total || 1;
      bar.value = done || 0;
      bar.setAttribute("aria-label", stage);
      progress.replaceChildren(`${stage} ${done || 0}${total ? `/${total} ` : ""}`, ...(total ? [bar] : []));
    } else {
      progress.textContent = job.error || "";
    }
    if (before !== job.state && ended.has(job.state)) {
      note.hidden = false;
      note.textContent = `Job ${job.id} ended: ${job.state}. Load the page again to see its plans.`;
    }
  };

  const refresh = async () => {
    const open = rows.filter((row) => !ended.has(row.querySelector("[data-part=state]").textContent));
    if (open.length === 0) return;
    try {
      const answer = await fetch("/api/jobs?limit=1000&state=queued&state=running");
      if (!answer.ok) throw new Error(answer.statusText);
      const jobs = new Map((await answer.json()).map((job) => [String(job.id), job]));
      for (const row of open) {
        let job = jobs.get(row.dataset.job);
        if (!job) job = await (await fetch(`/api/jobs/${row.dataset.job}`)).json();
        show(row, job);
      }
      pause = 2000;
    } catch {
      pause = Math.min(2 * pause, 60000);
      note.hidden = false;
      note.textContent = "The dashboard does not answer; trying again.";
    }
    setTimeout(refresh, pause);
  };
  setTimeout(refresh, pause);
})();
