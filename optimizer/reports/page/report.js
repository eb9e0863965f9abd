"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  document.body.append(tip);

  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // Colours are names of CSS variables, so that one set of charts serves both themes.
  const coloured = (value) => {
    if (typeof value === "string" && value.startsWith("--")) {
      const found = variable(value);
      const parts = found.split(",").map((part) => part.trim());
      return parts.length === 1 ? found : parts.map((part, index) => [index / (parts.length - 1), part]);
    }
    if (Array.isArray(value)) return value;
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
    }
    return value;
  };

  const axis = (given) => ({
    gridcolor: variable("--line"), zerolinecolor: variable("--line"), linecolor: variable("--line"),
    automargin: true, fixedrange: true, ...coloured(given), title: { ...(given.title || {}), standoff: 8 },
  });

  const layout = (chart, narrow) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: variable("--text"), size: narrow ? 12 : 13, family: getComputedStyle(document.body).fontFamily },
    margin: { l: narrow ? 8 : 16, r: 10, t: 10, b: 8 },
    height: chart.height,
    legend: { orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top", yref: "paper" },
    dragmode: false,
    hoverdistance: 24,
    ...coloured(chart.layout),
    shapes: (chart.layout.shapes || []).map(coloured),
    xaxis: axis(chart.layout.xaxis), yaxis: axis(chart.layout.yaxis),
  });

  const strip = (plan) => {
    const cells = document.createElement("div");
    cells.className = plan.length > 32 ? "strip dense-cells" : "strip";
    for (const letter of plan) {
      const cell = document.createElement("i");
      cell.className = letter;
      cell.textContent = letter;
      cells.append(cell);
    }
    return cells;
  };

  const show = (event) => {
    const point = event.points[0];
    const given = point.customdata;
    if (!given) return;
    const [plan, line] = given;
    tip.replaceChildren(...(plan ? [strip(plan)] : []), document.createTextNode(line));
    const pointer = event.event;
    const x = pointer.pageX ?? pointer.changedTouches?.[0]?.pageX ?? 0;
    const y = pointer.pageY ?? pointer.changedTouches?.[0]?.pageY ?? 0;
    const left = Math.min(x + 14, window.scrollX + root.clientWidth - tip.offsetWidth - 12);
    const above = y - tip.offsetHeight - 14;
    tip.style.left = `${Math.max(window.scrollX + 8, left)}px`;
    tip.style.top = `${above < window.scrollY + 50 ? y + 18 : above}px`;
    tip.style.visibility = "visible";
  };
  const hide = () => { tip.style.visibility = "hidden"; };

  // The charts' library is large: it runs once the page can be read.
  const loaded = new Promise((resolve) => {
    if (document.readyState === "complete") resolve();
    else window.addEventListener("load", resolve, { once: true });
  });
  const library = async () => {
    await loaded;
    const source = document.getElementById("plotly");
    if (!source) return;
    const script = document.createElement("script");
    script.textContent = source.textContent;
    source.remove();
    document.head.append(script);
  };

  const draw = async (chart) => {
    await library();
    const place = document.getElementById(`chart-${chart.name}`);
    const narrow = place.clientWidth < 560;
    const settings = { displayModeBar: false, responsive: true, scrollZoom: false };
    const traces = chart.traces.map(coloured);
    const page = layout(chart, narrow);
    if (narrow && traces[0].type === "heatmap") {
      // A phone has no room for long names beside the cells, nor for a number over each of them.
      traces[0].y = traces[0].y.map((name) => name.replace(", ", "<br>"));
      page.height += 14 * traces[0].y.length;
      page.xaxis.dtick = 4;
      page.xaxis.tickangle = 0;
    }
    await Plotly.react(place, traces, page, settings);
    if (!place.dataset.drawn) {
      place.on("plotly_hover", show);
      place.on("plotly_click", show);
      place.on("plotly_unhover", hide);
    }
    place.dataset.drawn = "yes";
  };

  // A chart is drawn when it comes near the screen: the page opens at once however long it is.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !entry.target.dataset.drawn) {
        near.unobserve(entry.target);
        draw(charts.find((chart) => `chart-${chart.name}` === entry.target.id));
      }
    }
  }, { rootMargin: "300px" });
  const redraw = () => charts.forEach((chart) => {
    if (document.getElementById(`chart-${chart.name}`).dataset.drawn) draw(chart);
  });
  for (const chart of charts) near.observe(document.getElementById(`chart-${chart.name}`));
  window.addEventListener("beforeprint", () => charts.forEach(draw));
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); redraw(); });
  dark.addEventListener("change", () => { label(); redraw(); });
  label();
})();
