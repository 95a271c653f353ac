"use strict";
// Shows values at the pointer or keyboard cursor. Without JavaScript the page shows the same curves.
const SVG = "http://www.w3.org/2000/svg";
const tip = document.getElementById("tip");
const list = (text) => text.split(" ").map(Number);
const short = (value) => Number(value.toPrecision(5)).toString();

function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle; else high = middle;
  }
  return wanted - values[low] < values[high] - wanted ? low : high;
}

for (const chart of document.querySelectorAll(".chart")) {
  const [left, right, first, last] = list(chart.dataset.x);
  const [low, high, bottom, top, wide] = list(chart.dataset.y);
  const scale = wide ? Math.log10 : (value) => value;
  const across = (x) => first + ((x - left) / (right - left)) * (last - first);
  const up = (y) => bottom + ((scale(y) - scale(low)) / (scale(high) - scale(low))) * (top - bottom);
  const overlay = chart.appendChild(document.createElementNS(SVG, "g"));
  let runs = null, at = null;

  function draw(tag, attributes) {
    const drawn = overlay.appendChild(document.createElementNS(SVG, tag));
    for (const [name, value] of Object.entries(attributes)) drawn.setAttribute(name, value);
  }

  function row(name, value, colour = null) {
    const line = tip.appendChild(document.createElement("p"));
    if (colour) line.className = colour;
    line.appendChild(document.createElement("span")).textContent = name;
    line.appendChild(document.createElement("b")).textContent = value;
  }

  function show(wanted, clientX, clientY) {
    runs ??= [...chart.querySelectorAll(".raw")].map((raw) => ({
      name: raw.dataset.name,
      colour: raw.classList[1],
      lines: [...chart.querySelectorAll(`[data-run="${raw.dataset.run}"]`)].map(({ dataset }) => ({ x: list(dataset.x), y: list(dataset.y) })),
    }));
    at = Math.min(right, Math.max(left, wanted));
    const places = runs.map(({ lines: [line] }) => line.x[nearest(line.x, at)]);
    const x = places.reduce((best, place) => (Math.abs(place - at) < Math.abs(best - at) ? place : best));
    overlay.replaceChildren();
    tip.replaceChildren();
    draw("path", { class: "cursor", d: `M${across(x)} ${bottom}V${top}` });
    row(chart.dataset.by, x.toLocaleString("en"));
    for (const { name, colour, lines } of runs) {
      if (x < lines[0].x[0] || x > lines[0].x.at(-1)) continue;
      const values = lines.map((line) => line.y[nearest(line.x, x)]);
      draw("circle", { class: `point ${colour}`, cx: across(x), cy: up(values.at(-1)), r: 3.5 });
      row(name, short(values[0]) + (values.length > 1 ? ` (mean ${short(values[1])})` : ""), colour);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = clientX + 16 + box.width < innerWidth ? clientX + 16 : clientX - 16 - box.width;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, Math.min(innerHeight - box.height - 8, clientY - box.height / 2))}px`;
  }

  function hide() {
    overlay.replaceChildren();
    tip.hidden = true;
  }

  chart.addEventListener("pointermove", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    show(left + ((place.x - first) / (last - first)) * (right - left), event.clientX, event.clientY);
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const box = chart.getBoundingClientRect();
    const wanted = (at ?? left) + (way * (right - left)) / 50;
    show(wanted, box.left + (across(wanted) / chart.viewBox.baseVal.width) * box.width, box.top + box.height / 2);
  });
}
