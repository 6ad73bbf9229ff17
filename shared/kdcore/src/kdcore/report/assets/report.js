"use strict";
// Values under the pointer (or the arrow keys) of every chart. The page says everything else without this script.
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const make = (name, attributes, parent) => {
    const node = document.createElementNS(parent.namespaceURI, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return parent.appendChild(node);
  };
  const shown = (figure) => [...figure.querySelectorAll(".plot")].find((plot) => getComputedStyle(plot).display !== "none");
  const nearest = (steps, x) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - steps[low - 1] <= steps[low] - x ? low - 1 : low;
  };
  const format = (value, gap) => value === null ? gap : String(Number(value.toPrecision(4)));

  for (const figure of document.querySelectorAll(".chart")) {
    const svg = figure.querySelector(":scope > svg"), chart = charts[Number(figure.dataset.chart)];
    const box = { left: 46, right: svg.viewBox.baseVal.width - 10, top: 8, bottom: svg.viewBox.baseVal.height - 24 };
    const name = (step) => chart.labels ? chart.labels[step] : "step " + step;  // a profile's x are labels
    let cursor = null, tip = null, at = null;

    const hide = () => { cursor?.remove(); tip?.remove(); cursor = tip = at = null; };
    const show = (step) => {
      const plot = shown(figure);
      hide();
      if (!plot) return;
      const { x0, x1, y0, y1, log, term } = Object.fromEntries(
        Object.entries(plot.dataset).map(([key, value]) => [key, key === "term" || key === "scale" ? value : Number(value)]));
      const px = (value) => box.left + (value - x0) / (x1 - x0) * (box.right - box.left);
      const py = (value) => box.bottom - ((log ? Math.log10(value) : value) - y0) / (y1 - y0) * (box.bottom - box.top);
      const found = chart.lines.map((line) => {
        const [steps, values] = line[term], index = nearest(steps, step);
        return { run: line.run, step: steps[index], value: values[index] };
      });
      at = found.reduce((best, point) => Math.abs(point.step - step) < Math.abs(best - step) ? point.step : best, found[0].step);
      cursor = make("g", { class: "cursor" }, svg);
      make("line", { x1: px(at), x2: px(at), y1: box.top, y2: box.bottom }, cursor);
      tip = document.createElement("div");
      tip.className = "tip";
      tip.setAttribute("role", "status");
      const rows = found.map((point, index) => {
        if (point.value !== null && !(log && point.value <= 0))
          make("circle", { class: "c" + chart.lines[index].colour, cx: px(point.step), cy: py(point.value), r: 3.5 }, cursor);
        const where = found.length > 1 && point.step !== at ? ` (step ${point.step})` : "";
        return (found.length > 1 ? point.run + ": " : "") + format(point.value, chart.labels ? "no value" : "not finite") + where;
      });
      for (const text of found.length > 1 ? [name(at), ...rows] : [`${name(at)}: ${rows[0]}`])
        tip.appendChild(document.createElement("div")).textContent = text;
      figure.appendChild(tip);
      const rect = svg.getBoundingClientRect();
      const x = px(at) / svg.viewBox.baseVal.width * rect.width + 12;
      const room = figure.clientWidth - tip.offsetWidth - 6;
      tip.style.left = Math.max(6, x + 10 > room ? x - tip.offsetWidth - 10 : x + 10) + "px";
      tip.style.top = rect.top - figure.getBoundingClientRect().top + 10 + "px";
    };
    const stepUnder = (event) => {
      const plot = shown(figure), rect = svg.getBoundingClientRect();
      if (!plot || !rect.width) return null;
      const x = (event.clientX - rect.left) / rect.width * svg.viewBox.baseVal.width;
      const x0 = Number(plot.dataset.x0), x1 = Number(plot.dataset.x1);
      return x0 + (x - box.left) / (box.right - box.left) * (x1 - x0);
    };
    svg.addEventListener("pointermove", (event) => { const step = stepUnder(event); if (step !== null) show(step); });
    svg.addEventListener("pointerdown", (event) => { const step = stepUnder(event); if (step !== null) show(step); });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      event.preventDefault();
      const plot = shown(figure);
      const steps = [...new Set(chart.lines.flatMap((line) => line[plot.dataset.term][0]))].sort((a, b) => a - b);
      const next = at === null ? (event.key === "ArrowRight" ? 0 : steps.length - 1)
        : Math.min(steps.length - 1, Math.max(0, nearest(steps, at) + (event.key === "ArrowRight" ? 1 : -1)));
      show(steps[next]);
    });
  }
})();
