"use strict";
// Sorting, and the similarity matrices of every round. The page works without it, but for these two.

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent;
  };
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    const empty = (v) => v === "–" || v === "";
    rows.sort((first, second) => {
      const a = value(first, column), b = value(second, column);
      if (empty(a) || empty(b)) return empty(a) - empty(b);  // what is not known stays below
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true});
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}

// Viridis, at nine places.
const STOPS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37]];

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1), low = Math.min(Math.floor(place), STOPS.length - 2);
  const mix = STOPS[low].map((from, i) => Math.round(from + (place - low) * (STOPS[low + 1][i] - from)));
  return `rgb(${mix.join(",")})`;
}

function node(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function matrices(section) {
  const curve = JSON.parse(section.querySelector("script[type='application/json']").textContent);
  const k = curve.names.length, rounds = curve.sparsity.length;
  const layers = Object.keys(curve.overlaps);
  const slider = section.querySelector("input[type=range]"), output = section.querySelector("output");
  const same = section.querySelector("input[type=checkbox]"), choice = section.querySelector("select");
  const place = (i, j) => i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i;

  function jaccard(layer, round, i, j) {
    const chosen = layer === null ? layers : [layer];
    const sum = (at) => chosen.reduce((total, name) => total + curve.overlaps[name][round][at], 0);
    const both = sum(place(i, j)), either = sum(place(i, i)) + sum(place(j, j)) - both;
    return either === 0 ? 1 : both / either;
  }

  const panels = [...section.querySelectorAll(".matrices figure")].map((figure) => {
    const margin = 46, cell = (230 - margin) / k, cells = [];
    const svg = figure.querySelector("svg");
    svg.setAttribute("viewBox", `0 0 230 ${232}`);
    curve.names.forEach((name, i) => {
      const short = name.length > 8 ? name.slice(0, 7) + "…" : name;
      if (k <= 20) {
        node("text", {x: margin - 3, y: margin + (i + .5) * cell + 3, "text-anchor": "end"}, svg, short);
        const x = margin + (i + .5) * cell + 3;
        node("text", {x, y: margin - 4, transform: `rotate(-60 ${x} ${margin - 4})`}, svg, short);
      }
      for (let j = 0; j < k; j++) {
        const box = node("rect", {x: margin + j * cell, y: margin + i * cell, width: cell - .5, height: cell - .5}, svg);
        cells.push([i, j, box, node("title", {}, box)]);
      }
    });
    return {figure, svg, cells, range: figure.querySelector("small")};
  });

  const listed = section.querySelector(".numbers table");
  function list(layer, round) {  // what colours say, for those who do not see them
    const lines = curve.names.map((name, i) =>
      [name, ...curve.names.map((_, j) => i === j ? "–" : jaccard(layer, round, i, j).toFixed(3))]);
    listed.replaceChildren(...[["ticket", ...curve.names], ...lines].map((texts, r) => {
      const line = document.createElement("tr");
      line.append(...texts.map((text, c) => {
        const cell = document.createElement(r && c ? "td" : "th");
        if (!r || !c) cell.scope = r ? "row" : "col";
        cell.textContent = text;
        return cell;
      }));
      return line;
    }));
  }

  function draw() {
    const round = Number(slider.value), chosen = choice.selectedIndex ? choice.value : null;
    const said = `${(100 * curve.sparsity[round]).toFixed(1)}%`;
    output.textContent = said;
    slider.setAttribute("aria-valuetext", `${said} sparsity, round ${round + 1} of ${rounds}`);
    for (const {figure, svg, cells, range} of panels) {
      let layer = figure.dataset.layer === undefined ? null : figure.dataset.layer;
      if (figure.dataset.chosen !== undefined) layer = chosen;
      const values = cells.map(([i, j]) => jaccard(layer, round, i, j));
      const others = values.filter((_, n) => cells[n][0] !== cells[n][1]);
      const low = same.checked ? 0 : Math.min(...others), high = same.checked ? 1 : Math.max(...others);
      cells.forEach(([i, j, box, title], n) => {
        const share = high > low ? (values[n] - low) / (high - low) : 1;
        box.setAttribute("fill", i === j ? "none" : colour(share));
        title.textContent = `${curve.names[i]} – ${curve.names[j]}: ${values[n].toFixed(3)}`;
      });
      const mean = others.reduce((a, b) => a + b, 0) / others.length;
      range.textContent = `mean ${mean.toFixed(3)}, colours ${low.toFixed(3)} to ${high.toFixed(3)}`;
      svg.setAttribute("aria-label", `mask similarity, ${layer === null ? "all layers" : layer}, ${said} sparsity: mean ` +
        `${mean.toFixed(3)}, from ${Math.min(...others).toFixed(3)} to ${Math.max(...others).toFixed(3)}`);
    }
    list(chosen, round);
    for (const tree of section.querySelectorAll("[data-round]")) tree.hidden = Number(tree.dataset.round) !== round;
  }
  slider.addEventListener("input", draw);
  same.addEventListener("change", draw);
  choice.addEventListener("change", draw);
  draw();
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll(".similarity").forEach(matrices);
// On paper, what can be opened is open, but for the numbers of what is drawn.
const opened = "details:not(.numbers)";
addEventListener("beforeprint", () => document.querySelectorAll(opened).forEach((d) => { d.open = true; }));
document.documentElement.dataset.ready = "yes";
