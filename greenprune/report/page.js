"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const figures = read("figures"), facts = read("facts");
  const runs = Object.keys(facts.runs);
  const plots = [...document.querySelectorAll("[data-figure]")];
  let shown = new Set(runs);

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // The ink of a figure is that of the page, light or dark.
  const ink = (layout) => {
    const patch = { "font.color": colour("--ink") };
    for (const axis of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      patch[axis + ".gridcolor"] = colour("--grid");
      patch[axis + ".linecolor"] = colour("--line");
      patch[axis + ".tickcolor"] = colour("--line");
    }
    return patch;
  };

  // A gate map holds whole percents in bytes; its labels are made when it is drawn.
  const label = (trace, layout) => {
    const [rows, columns] = trace.z.shape.split(",").map(Number);
    const bytes = Uint8Array.from(atob(trace.z.bdata), (letter) => letter.charCodeAt(0));
    const names = new Map(layout.meta.units.map((name, row) => [row, name]));
    const first = layout.meta.epochs;
    trace.text = Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, column) => {
      const percent = bytes[row * columns + column];
      const state = percent === facts.gone ? "gone" : percent === facts.notKnown ? "not known" : `open ${percent} %`;
      return `${names.get(row)}, epoch ${first[column]}: ${state}`;
    }));
  };

  const isShown = (meta) => {
    if (!meta || meta.always) return true;
    const members = (group) => runs.filter((run) => facts.runs[run].group === group);
    if (meta.run !== undefined) return shown.has(meta.run);
    if (meta.group !== undefined) return members(meta.group).every((run) => shown.has(run));
    if (meta.any !== undefined) return members(meta.any).some((run) => shown.has(run));
    return shown.size === runs.length;
  };

  const filtered = (data) => {
    const named = new Set();
    for (const trace of data) {
      trace.visible = isShown(trace.meta);
      if (trace.meta && trace.meta.part !== undefined) {
        trace.showlegend = trace.visible && !named.has(trace.meta.part);
        if (trace.visible) named.add(trace.meta.part);
      }
    }
    return data;
  };

  const draw = (plot) => {
    const figure = figures[plot.dataset.figure];
    if (plot.classList.contains("map")) {
      figure.data.filter((trace) => !trace.text).forEach((trace) => label(trace, figure.layout));
    }
    const layout = structuredClone(figure.layout);
    for (const [path, value] of Object.entries(ink(layout))) {
      const keys = path.split("."), last = keys.pop();
      keys.reduce((at, key) => (at[key] ??= {}), layout)[last] = value;
    }
    return Plotly.react(plot, filtered(figure.data), layout, { responsive: true, displayModeBar: false });
  };

  const isVisible = (plot) => !plot.closest("[hidden]");
  const drawAll = () => Promise.all(plots.filter(isVisible).map(draw));

  const legend = document.getElementById("legend");
  const network = document.getElementById("network");

  const showNetwork = (run) => {
    for (const option of network.options) {
      const article = document.getElementById(option.value);
      article.hidden = option.dataset.run !== run;
      if (!article.hidden) {
        network.value = option.value;
        article.querySelectorAll("[data-figure]").forEach(draw);
      }
    }
  };

  const update = () => {
    for (const row of document.querySelectorAll("tr[data-run]")) row.hidden = !shown.has(row.dataset.run);
    for (const row of document.querySelectorAll("tr.group")) row.hidden = !isShown({ any: Number(row.dataset.group) });
    const alone = shown.size === 1 && runs.length > 1 ? [...shown][0] : null;
    for (const button of document.querySelectorAll("button.run")) {
      button.setAttribute("aria-pressed", String(button.dataset.run === alone));
    }
    for (const box of legend.querySelectorAll("input")) {
      const members = runs.filter((run) => facts.runs[run].group === Number(box.dataset.group));
      const those = members.filter((run) => shown.has(run)).length;
      box.checked = those === members.length;
      box.indeterminate = those > 0 && those < members.length;
    }
    document.getElementById("shown").textContent = alone
      ? `Only ${alone} is shown. Choose it again, or Show all, to see all runs.`
      : shown.size === runs.length
        ? `All ${runs.length} runs are shown. Choose a run in a table to see it alone.`
        : `${shown.size} of ${runs.length} runs are shown.`;
    drawAll();
  };

  if (legend) {
    legend.addEventListener("change", (event) => {
      const group = Number(event.target.dataset.group);
      for (const run of runs.filter((name) => facts.runs[name].group === group)) {
        if (event.target.checked) shown.add(run); else shown.delete(run);
      }
      update();
    });
    document.getElementById("show-all").addEventListener("click", () => { shown = new Set(runs); update(); });
    for (const button of document.querySelectorAll("button.run")) {
      button.addEventListener("click", () => {
        const again = button.getAttribute("aria-pressed") === "true";
        shown = again ? new Set(runs) : new Set([button.dataset.run]);
        if (!again) showNetwork(button.dataset.run);
        update();
      });
    }
    network.addEventListener("change", () => showNetwork(network.selectedOptions[0].dataset.run));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
  drawAll().then(() => {
    // Plotly keeps a drawing off the page to measure texts with; it says nothing to anybody.
    document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true");
    document.documentElement.setAttribute("data-ready", "true");
  });
})();
