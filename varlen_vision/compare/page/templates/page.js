(function () {
  "use strict";
  var root = document.documentElement;
  var button = document.getElementById("theme");
  var system = window.matchMedia("(prefers-color-scheme: dark)");
  function stored() { try { return localStorage.getItem("varlen-vision-theme"); } catch (error) { return null; } }
  function theme() { return root.dataset.theme || (system.matches ? "dark" : "light"); }
  function show() {
    var other = theme() === "dark" ? "light" : "dark";
    button.textContent = other === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", "Switch to the " + other + " theme");
  }
  if (stored() === "dark" || stored() === "light") { root.dataset.theme = stored(); }
  button.hidden = false;
  show();
  button.addEventListener("click", function () {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("varlen-vision-theme", root.dataset.theme); } catch (error) { /* not kept */ }
    show();
  });
  system.addEventListener("change", show);

  var save = document.getElementById("save");
  document.getElementById("save-where").hidden = false;
  save.addEventListener("click", function () {
    var text = document.getElementById("comparison").textContent;
    var link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "comparison.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  // On paper nothing can be opened.
  var opened = [];
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not([open])").forEach(function (one) { one.open = true; opened.push(one); });
  });
  window.addEventListener("afterprint", function () {
    opened.forEach(function (one) { one.open = false; });
    opened = [];
  });
})();
