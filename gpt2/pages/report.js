// Shows the values at the pointer, from the nearest row of the figure's table.
for (const figure of document.querySelectorAll("figure")) {
  const plot = figure.querySelector(".plot"), cross = plot.querySelector(".cross");
  const readout = figure.querySelector(".readout"), rows = [...figure.querySelectorAll("tbody tr")];
  const heads = [...figure.querySelectorAll("thead th")].map((head) => head.textContent);
  const show = (event) => {
    const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
    const distance = (row) => Math.abs(row.dataset.x - x);
    const row = rows.reduce((best, row) => (distance(row) < distance(best) ? row : best));
    for (const end of ["x1", "x2"]) cross.setAttribute(end, 100 * row.dataset.x + "%");
    const cells = [...row.cells].map((cell, i) => (cell.textContent ? heads[i] + " " + cell.textContent : ""));
    readout.textContent = cells.filter(Boolean).join(" \u00b7 ");
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => (readout.textContent = ""));
}
